"""What a machine runs a checkpoint or bundle in, against figures computed by hand from the published sizes."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mindomni_rt import BadRequestError, OutOfMemoryError
from mindomni_rt.bundle.contracts import OPTIONAL, STAGES, graph_specs, profile
from mindomni_rt.bundle.manifest import FileEntry, GraphEntry, Manifest
from mindomni_rt.checkpoint.config import published
from mindomni_rt.checkpoint.layout import PARTS, Checkpoint, TensorEntry
from mindomni_rt.devices.table import RESERVE
from mindomni_rt.memory.bundle_fit import fit_bundle, graph_bytes
from mindomni_rt.memory.bundle_need import peak
from mindomni_rt.memory.choose import choose_checkpoint
from mindomni_rt.memory.fit import budget_bytes, cpu_needs, cpu_types, fit_checkpoint, stored_types
from mindomni_rt.memory.footprint import StageMemory
from mindomni_rt.memory.gpus import Gpu
from mindomni_rt.memory.guard import named_memory_errors
from mindomni_rt.memory.host import HostMemory
from mindomni_rt.memory.layers import BUDGETED, Workload
from mindomni_rt.memory.machine import Machine
from mindomni_rt.memory.planner import plan
from mindomni_rt.memory.precision import parse_precision

GB = 10**9


def checkpoint(kind: str = "BF16") -> Checkpoint:
    """The published sizes, stored in one type."""
    tensors = {part: {"x": TensorEntry(Path("x"), "x", kind, (2, 2))} for part in PARTS}
    return Checkpoint(Path("MODEL"), published(), tensors, (), ())


def host(free: float, bfloat16: bool = True, *gpus: Gpu) -> Machine:
    return Machine(host=HostMemory(round(free * GB), round(free * GB)), bfloat16=bfloat16, gpus=gpus)


def card(free: float, capability: tuple[int, int] = (8, 9)) -> Gpu:
    size = round(free * GB)
    return Gpu(index=0, name="card", capability=capability, total=size, free=size)


def test_needs_of_the_published_model_on_a_cpu() -> None:
    stored = stored_types(checkpoint())
    needs = {need.stage: need for need in cpu_needs(published(), stored, "bfloat16", Workload())}
    # Language: 7,615,616,512 parameters less the input table's 544,997,376, two bytes each, stay mapped.
    assert needs["language"].mapped == 2 * (7_615_616_512 - 544_997_376)
    # Its own: 0.5 GB of libraries, 83,653,863 parameters of the VAE in float32, hidden states and K/V of 300 tokens
    # (300 x 2 x (3584 + 2 x 28 x 512) bytes), the MLP of 100 tokens and the logits.
    own = 500_000_000 + 4 * 83_653_863 + 300 * 2 * (3584 + 2 * 28 * 512) + 100 * 2 * (3 * 3584 + 4 * 18944)
    assert needs["language"].own == pytest.approx(own + 152064 * 22, rel=1e-3)
    assert needs["denoiser"].mapped == pytest.approx(2 * 3.66e9, rel=0.01)
    # In float32 everything is converted: 12,276,910,327 parameters of four bytes are the process's own.
    for need in cpu_needs(published(), stored, "float32", Workload()):
        assert need.mapped == 0 or need.stage == "vae"
        assert need.own > 500_000_000 + 4 * 12_276_910_327
    # Stored in float32, float32 is mapped and nothing is converted but nothing else either.
    needs = {n.stage: n for n in cpu_needs(published(), stored_types(checkpoint("F32")), "float32", Workload())}
    assert needs["language"].own < 1 * GB and needs["language"].mapped == 4 * (7_615_616_512 - 544_997_376)


def test_the_first_type_to_try() -> None:
    assert cpu_types("bfloat16") == ("bfloat16",) and cpu_types("float16") == ("float16",)
    assert cpu_types("float32") == ("float32", "bfloat16")


def test_widened_weights_are_mapped_as_stored_and_the_rest_is_float32() -> None:
    narrow, wide = (
        {n.stage: n for n in cpu_needs(published(), stored_types(checkpoint()), "bfloat16", Workload(), w)}
        for w in (False, True)
    )
    for stage, need in wide.items():
        assert need.mapped == narrow[stage].mapped
    # Hidden states, K/V of 300 tokens and the MLP of 100 take two bytes more each; a slice of 64 MB, norms and biases.
    more = 300 * 2 * (3584 + 2 * 28 * 512) + 100 * 2 * (3 * 3584 + 4 * 18944) + 152064 * 2 + 100_000_000
    assert wide["language"].own - narrow["language"].own == pytest.approx(more, rel=1e-3)


@pytest.mark.parametrize(
    ("stored", "free", "bfloat16", "expected"),
    # Stored in float32, 28.3 GB of the language model are mapped; 49.1 GB of converted weights fit nowhere here.
    [
        ("BF16", 21, True, "bfloat16"),
        ("BF16", 21, False, "bfloat16"),
        ("BF16", 60, False, "bfloat16"),
        ("F16", 21, True, "float16"),
        ("F32", 40, False, "float32"),
        ("F32", 28, True, "bfloat16"),
    ],
)
def test_type_on_a_cpu(
    stored: str, free: float, bfloat16: bool, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = fit_checkpoint(checkpoint(stored), host(free, bfloat16), device="cpu")
    assert found.dtype == expected and found.precision is None and found.budget is None
    assert found.peak <= free * GB and found.free == round(free * GB)
    with caplog.at_level(logging.INFO):
        found.log()
    (record,) = caplog.records
    rounded = stored == "F32" and expected != "float32"
    assert record.levelno == (logging.WARNING if rounded else logging.INFO)
    assert expected in record.message and ("float32 does not fit" in record.message) == rounded
    widened = expected == "float16" or (expected == "bfloat16" and not bfloat16)
    assert ("computed in float32" in record.message) == widened


def test_the_boundary_on_a_cpu() -> None:
    need = 15_015_858_332  # the sum of `test_needs_of_the_published_model_on_a_cpu`
    assert fit_checkpoint(checkpoint(), host(need * 1.001 / GB), device="cpu").dtype == "bfloat16"
    with pytest.raises(OutOfMemoryError) as raised:
        fit_checkpoint(checkpoint(), host(need * 0.999 / GB), device="cpu")
    text = str(raised.value)
    assert "language needs 15.02 GB" in text and "15.00 GB are free" in text and "nothing was loaded" in text
    assert "mindomni export build MODEL --target cpu --precision int8 --out BUNDLE" in text


def test_a_smaller_machine_is_told_of_int4_and_a_tiny_one_of_nothing() -> None:
    with pytest.raises(OutOfMemoryError, match="--precision int4"):
        fit_checkpoint(checkpoint(), host(7.5), device="cpu")
    with pytest.raises(OutOfMemoryError, match="Nothing fits"):
        fit_checkpoint(checkpoint(), host(2), device="cpu")


def test_a_type_asked_for_is_kept_to() -> None:
    with pytest.raises(OutOfMemoryError, match=r"in float32.*This fits: dtype='bfloat16'"):
        fit_checkpoint(checkpoint(), host(21), device="cpu", dtype="float32")
    with pytest.raises(BadRequestError, match="float8"):
        fit_checkpoint(checkpoint(), host(21), device="cpu", dtype="float8")


def test_budgets() -> None:
    assert budget_bytes("auto", 5) == 5 and budget_bytes("auto", None) is None and budget_bytes(None, 5) is None
    assert budget_bytes("8GB", 9 * GB) == 8 * GB and budget_bytes("8GB", 7 * GB) == 7 * GB
    assert budget_bytes(3e9, None) == 3 * GB
    with pytest.raises(BadRequestError, match="auto, a size"):
        budget_bytes("much", 5)
    with pytest.raises(OutOfMemoryError, match=r"memory_budget is 10\.00 GB; nothing was loaded"):
        fit_checkpoint(checkpoint(), host(21), device="cpu", memory_budget="10GB")
    # No limit: the first choice, unchecked. Unknown free memory: the same.
    assert fit_checkpoint(checkpoint(), host(1), device="cpu", memory_budget=None).dtype == "bfloat16"
    assert fit_checkpoint(checkpoint("F32"), Machine(host=None), device="cpu").dtype == "float32"


def test_a_large_gpu_takes_the_defaults() -> None:
    found = fit_checkpoint(checkpoint(), host(64, True, card(80)))
    assert (found.device, found.dtype, found.precision, found.budget) == ("cuda", "bfloat16", None, None)
    assert not found.lossy
    old = fit_checkpoint(checkpoint(), host(64, True, card(80, (7, 5))))
    assert (old.dtype, old.precision) == ("float16", None)


@pytest.mark.parametrize("free", [23, 17, 16, 12, 8, 6])
def test_a_smaller_gpu_takes_the_most_exact_plan_that_fits(free: float) -> None:
    found = fit_checkpoint(checkpoint(), host(64, True, card(free)))
    assert found.dtype == "bfloat16" and found.peak <= free * GB
    assert found.precision is not None
    chosen = parse_precision(found.precision, "bfloat16")
    assert plan(published(), BUDGETED, precision=chosen, budget=found.free, reserve=RESERVE[False]).peak == found.peak
    # bfloat16 swaps on 23 GB: language takes 15.2 GB, decoder 7.3. In 16 GB it would leave 2 MB at 100 tokens.
    assert (chosen.language == "bfloat16") == (free >= 17)
    assert (found.budget is None) == ("move" not in found.why)


def test_parts_that_wait_need_room_on_the_host() -> None:
    # On a card of 16 GB bfloat16 runs with the decoder (7.3 GB) waiting on the host, where 4 GB are too few for it.
    rich = fit_checkpoint(checkpoint(), host(64, True, card(17)))
    poor = fit_checkpoint(checkpoint(), host(4, True, card(17)))
    assert "move" in rich.why and parse_precision(str(rich.precision), "bfloat16").language == "bfloat16"
    assert parse_precision(str(poor.precision), "bfloat16").language != "bfloat16"


def test_no_part_waits_where_host_and_gpu_share_memory() -> None:
    """On a Jetson a copy on the host beside the one on the device would cost memory, not spare it."""
    orin = Gpu(index=0, name="Orin", capability=(8, 7), total=None, free=None)
    assert set(fit_checkpoint(checkpoint(), host(40, True, orin), device="cuda").stays or ()) == set(PARTS)
    small = fit_checkpoint(checkpoint(), host(18, True, orin), device="cuda")
    assert set(small.stays or ()) == set(PARTS) and small.moved_bytes == 0
    assert small.precision is not None and parse_precision(small.precision, "bfloat16").language == "int4"
    with pytest.raises(OutOfMemoryError, match=r"share memory no part can wait"):
        fit_checkpoint(checkpoint(), host(9, True, orin), device="cuda")


@pytest.mark.parametrize("budget", ["auto", "7.5GB"])
def test_a_request_on_a_gpu_is_checked_before_its_work(budget: str) -> None:
    """`memory_budget` limits as much as what is free."""
    free = 7.5 if budget == "auto" else 80
    found = fit_checkpoint(
        checkpoint(), host(64, True, card(free)), device="cuda", precision="int4", memory_budget=budget
    )
    found.check(replace(Workload(), prompt_tokens=256))  # what was planned for
    for larger in (dict(height=2048, width=2048), dict(prompt_tokens=6000), dict(images=8)):
        with pytest.raises(OutOfMemoryError, match=r"of memory needed after \d+ tokens of text, 7\.50 GB may be used"):
            found.check(Workload(**larger))
    # A picture of 1024 x 1024 pixels is 5476 patches and fits; one of 16,384 tokens does not, and the error says which.
    found.check(Workload(patches=(74, 74), prompt_tokens=100 + 1369, height=512, width=512))
    large = Workload(patches=(256, 256), prompt_tokens=100 + 16384, height=512, width=512)
    with pytest.raises(OutOfMemoryError, match=r"of memory needed after .* with max_image_tokens=\d+ it fits"):
        found.check(large)
    # A question ends with its text: nothing of it is painted.
    found.check(Workload(paints=False, height=4096, width=4096))
    with pytest.raises(OutOfMemoryError, match=r"^a question: .* with max_image_tokens=\d+ it fits"):
        found.check(replace(large, paints=False))
    # Without a limit nothing is known to be too large.
    free_of = fit_checkpoint(checkpoint(), host(64, True, card(80)), device="cuda", memory_budget=None)
    free_of.check(Workload(height=4096, width=4096))


def test_a_gpu_that_is_too_small_names_what_fits() -> None:
    with pytest.raises(OutOfMemoryError, match=r"does not fit cuda \(card\).*On the CPU this fits: cpu, bfloat16"):
        fit_checkpoint(checkpoint(), host(21, True, card(2)))
    with pytest.raises(OutOfMemoryError, match="does not fit cuda"):
        fit_checkpoint(checkpoint(), host(64, True, card(20)), dtype="float32")
    with pytest.raises(OutOfMemoryError, match="this fits"):
        fit_checkpoint(checkpoint(), host(64, True, card(8)), precision="bfloat16")
    asked = fit_checkpoint(checkpoint(), host(64, True, card(16)), precision=["int4", "attention=int8"][0])
    assert asked.precision == "int4" and not asked.lossy


def bundle(runtime: str = "onnx", precision: str = "int8", **sizes: float) -> Manifest:
    """A bundle of the published model; sizes in GB of each stage's one file, and of a file that two graphs share."""
    files = {f"{stage}.onnx": FileEntry(sha256="0" * 64, bytes=round(size * GB)) for stage, size in sizes.items()}
    shared = "shared.data"
    files[shared] = FileEntry(sha256="0" * 64, bytes=GB // 2)
    files |= {f"mllm/{name}": FileEntry(sha256="0" * 64, bytes=1) for name in ("tokenizer.json", "chat_template.json")}
    graphs = {
        stage: GraphEntry(
            stage=stage,
            file=f"{stage}.onnx",
            precision=precision if stage in ("language", "prefix", "denoiser") else "fp32",
            dtype="float32",
            data=(shared,) if stage in ("prefix", "denoiser") else (),
        )
        for stage in sizes
    }
    for name, spec in graph_specs(published()).items():  # the small graphs that every bundle has beside them
        if name not in {*graphs, *OPTIONAL}:
            file = f"{name}.onnx"
            files[file] = FileEntry(sha256="0" * 64, bytes=0)
            graphs[name] = GraphEntry(stage=spec.stage, file=file, precision="fp32", dtype="float32")
    return Manifest(
        model=published(),
        runtime=runtime,
        runtime_version="1.24",
        targets=() if runtime == "onnx" else ("sm_89",),
        dtype="float32",
        profile=profile("1024", published()),
        graphs=graphs,
        files=files,
        built_by={},
    )


SIZES = {"vision": 2.7, "language": 8.0, "connector": 1.0, "prefix": 3.5, "denoiser": 3.5, "vae": 0.3}


def test_a_bundle_counts_its_files() -> None:
    sizes = graph_bytes(bundle(**SIZES))
    # The file that both halves of the decoder name is loaded for each.
    assert sizes["denoiser"] == sizes["prefix"] == 4 * GB and sizes["language"] == 8 * GB


def test_a_bundle_keeps_what_fits() -> None:
    made = bundle(**SIZES)
    # All weights are 20 GB; the largest work beside them is the VAE's 4.7 GB at 1024².
    whole = fit_bundle(made, host(25.5), folder=Path("B"))
    assert whole.stays == STAGES and not whole.lossy and "everything stays" in whole.why
    # With 15 GB: 0.25 + 4.73 + 0.3 of the VAE leave 9.7 GB for what stays beside it, and 14.75 - 4 - 0.8 beside the
    # denoiser: language's 8 GB and connector's 1.
    part = fit_bundle(made, host(15), folder=Path("B"))
    assert part.stays is not None and {"language", "connector"} <= set(part.stays) and part.peak <= 15 * GB
    assert "denoiser" not in part.stays and "take turns" in part.why and part.lossy and part.side == 1024
    # With 9 GB: language alone needs 8.25 and its work.
    least = fit_bundle(made, host(9), folder=Path("B"))
    assert least.stays is not None and "language" not in least.stays and least.peak <= 9 * GB


def test_vision_leaves_first() -> None:
    """Sizes of a whole int4 bundle: all of it is 13.9 GB with 0.5 GB counted twice; without vision 11.2 GB."""
    sizes = {"vision": 2.7, "language": 5.1, "connector": 0.95, "prefix": 2.1, "denoiser": 2.1, "vae": 0.3}
    made = bundle(precision="int4", **sizes)
    found = fit_bundle(made, host(17), folder=Path("B"))
    assert found.stays == tuple(stage for stage in STAGES if stage != "vision")
    assert fit_bundle(made, host(22), folder=Path("B")).stays == STAGES


def test_a_bundle_that_fits_nowhere_names_another() -> None:
    with pytest.raises(OutOfMemoryError) as raised:
        fit_bundle(bundle(**SIZES), host(8), folder=Path("B"))
    text = str(raised.value)
    assert "B does not fit cpu: stage language alone needs 8.3" in text and "8.00 GB are free" in text
    assert "nothing was loaded" in text and "--precision int4" in text
    with pytest.raises(OutOfMemoryError, match="Nothing smaller can be built"):
        fit_bundle(bundle(precision="int4", **SIZES), host(8), folder=Path("B"))


def test_engines_count_against_the_gpu() -> None:
    made = bundle("tensorrt_rtx", **{**SIZES, "language": 4.0})
    assert fit_bundle(made, host(1, True, card(24)), folder=Path("B")).stays == STAGES
    found = fit_bundle(made, host(1, True, card(12)), folder=Path("B"))
    assert found.device == "cuda" and found.stays is not None and set(found.stays) < set(STAGES)
    # Without a GPU the runtime's own message is the better one: nothing is refused here.
    assert fit_bundle(made, host(64), folder=Path("B")).stays == STAGES


def test_stages_of_a_bundle_take_turns_by_hand() -> None:
    def stage(name: str, work: int) -> StageMemory:
        return StageMemory(stage=name, weights=0, state=0, activations=work)

    stages, weights = (
        [stage("language", 1), stage("denoiser", 4), stage("vae", 6)],
        {"language": 10, "denoiser": 5, "vae": 2},
    )
    assert peak(stages, weights, ("language", "denoiser", "vae")) == 10 + 5 + 2 + 6
    assert peak(stages, weights, ("language",)) == 10 + 5 + 4  # the denoiser visits
    assert peak(stages, weights, ()) == 10 + 1


def test_published_bundle_in_int4_under_ten_gigabytes() -> None:
    """The aim for 512² images: language in int4, the largest stage, beside its head and input table."""
    from mindomni_rt.memory.bundle_need import predicted_need

    need = predicted_need(published(), "int4", Workload(height=512, width=512))
    # 6,525,288,448 weights of 4.25 bits and the head's 544,997,376 of 8; the input table in 16 or 32 bits.
    weights = 6_525_288_448 * 4.25 / 8 + 544_997_376
    assert weights + 544_997_376 * 2 < need < weights + 544_997_376 * 4 + 0.5 * GB < 10 * GB


def test_memory_errors_are_named() -> None:
    class Cuda(RuntimeError):
        pass

    Cuda.__module__, Cuda.__name__ = "torch", "OutOfMemoryError"
    cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    for error in (MemoryError(), Cuda("CUDA out of memory. Tried 2 GiB\nmore"), cpu):
        named = pytest.raises(OutOfMemoryError, match=r"out of memory while loading: .*\. Use less")
        with named, named_memory_errors("loading", "Use less"):
            raise error
    for other in (RuntimeError("shapes differ"), ValueError("no")):
        with pytest.raises(type(other)), named_memory_errors("loading", "Use less"):
            raise other


def test_only_free_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindomni_rt.memory.choose.open_checkpoint", lambda folder: checkpoint())
    choose = partial(choose_checkpoint, Path("MODEL"))
    assert choose(machine=host(21)).dtype == "bfloat16"
    assert choose(machine=host(64, True, card(80))).device == "cuda"
    assert choose(machine=host(64, True, card(80)), device="cpu").device == "cpu"
    with pytest.raises(OutOfMemoryError, match="nothing was loaded"):
        choose(machine=host(13))
    # Nothing to decide: these go to the backend as they are, which refuses what it cannot do.
    for given in (
        dict(device="cpu", memory_budget="8GB"),
        dict(device="cpu", memory_budget=None),
        dict(device="cpu", precision="int4"),
        dict(device="cpu", fast=True, precision="int8"),
        dict(device="cuda", fast=False),
        dict(device="mps"),
    ):
        found = choose(machine=host(1, True, card(1)), **given)
        assert (found.device, found.dtype) == (given["device"], None) and found.precision == given.get("precision")
        assert found.budget == given.get("memory_budget")
    # A GPU and the fast path: a size is a limit, and no limit is none.
    assert choose(machine=host(64, True, card(80)), memory_budget="17GB").budget == 17 * GB
    assert choose(machine=host(64, True, card(1)), memory_budget=None).precision is None


def test_load_says_what_it_chose_and_refuses_before_reading(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mindomni_rt
    from mindomni_rt.model.random.write import cut, write_random_checkpoint

    folder = tmp_path / "model"
    write_random_checkpoint(folder, cut(published(), 1, 32))
    monkeypatch.setattr("mindomni_rt.memory.choose.read_machine", lambda **_: host(21))
    with caplog.at_level(logging.INFO):
        assert mindomni_rt.load(folder, device="cpu").backend.dtype == "bfloat16"
    assert caplog.text.count("predicted peak") == 1 and "21.00 GB free" in caplog.text
    monkeypatch.setattr("mindomni_rt.memory.choose.read_machine", lambda **_: host(21, bfloat16=False))
    assert mindomni_rt.load(folder, device="cpu").backend.dtype == "bfloat16"
    assert "computed in float32" in caplog.text
    monkeypatch.setattr("mindomni_rt.memory.choose.read_machine", lambda **_: host(0.1))
    monkeypatch.setattr("mindomni_rt.backends.torch.backend.load_torch", None)
    with pytest.raises(OutOfMemoryError, match="nothing was loaded"):
        mindomni_rt.load(folder, device="cpu")


def test_a_request_that_would_not_fit_is_refused_before_its_work() -> None:
    found = fit_checkpoint(checkpoint(), host(16), device="cpu")
    assert found.side == 1024 and found.needs is not None
    found.check(Workload(height=1024, width=1024))
    assert found.needs(Workload()) == found.peak  # what the choice was made by
    # 64 images' float32 noise, velocities and blocks of 4096 tokens each: more than the gigabyte that is left.
    with pytest.raises(OutOfMemoryError, match=r"64 images of 1024x1024: .* one image of \d+x\d+ fits"):
        found.check(Workload(images=64))
    with pytest.raises(OutOfMemoryError, match=r"1 image of 4096x4096"):
        fit_checkpoint(checkpoint(), host(15.1), device="cpu").check(Workload(height=4096, width=4096))
    unknown = fit_checkpoint(checkpoint(), Machine(host=None), device="cpu")
    unknown.check(Workload(images=256))  # nothing is known, nothing refused


class _NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize("budget", [_NoRepr(), [8], True, b"8GB", "8 gallons"])
def test_a_budget_that_is_no_size_is_named(budget: object) -> None:
    with pytest.raises(BadRequestError, match="expected auto, a size such as"):
        fit_checkpoint(checkpoint(), host(21), device="cpu", memory_budget=budget)  # type: ignore[arg-type]
