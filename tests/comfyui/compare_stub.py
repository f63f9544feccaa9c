"""Run by a ComfyUI's own Python in its folder: what of `stub/` it does not have. Prints one line each."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

STUB = Path(__file__).parent / "stub"


def stub(name: str) -> Any:
    path = STUB / f"{name.replace('.', '/')}.py"
    sys.path.insert(0, str(STUB))
    spec = importlib.util.spec_from_file_location(f"stub_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if name != "comfy.utils":  # it imports its neighbour by a relative name
        spec.loader.exec_module(module)
    sys.path.remove(str(STUB))
    return module


def parameters(call: Any) -> set[str]:
    return set(inspect.signature(call).parameters)


def differences() -> list[str]:
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    importlib.import_module("utils.extra_config")  # before comfy.utils, which hides it
    import folder_paths
    import server
    from comfy import model_management
    from comfy import utils as comfy_utils
    from comfy_api.latest import ComfyExtension, io

    ours, found = stub("comfy_api.latest"), []

    def expect(what: str, condition: bool) -> None:
        if not condition:
            found.append(what)

    for name, (kind, accepted) in ours.WIDGETS.items():
        real = getattr(io, name)
        expect(f"{name}.io_type", real.io_type == kind)
        more = {"id", "display_name", "optional", "tooltip", *accepted}
        expect(f"{name}.Input takes {more}", more <= parameters(real.Input))
    for kind in (io.Image, io.Custom("MINDOMNI_MODEL")):
        expect(f"{kind}.Input", {"id", "optional", "tooltip"} <= parameters(kind.Input))
        output = {"id", "display_name", "tooltip", "is_output_list"}
        expect(f"{kind}.Output", output <= parameters(kind.Output))
    expect("IMAGE", io.Image.io_type == "IMAGE")
    schema = parameters(ours.Schema) - {"search_aliases"}  # newer than some that are in use
    expect(f"Schema takes {schema}", schema <= parameters(io.Schema))
    expect("NodeOutput", parameters(ours.NodeOutput) == parameters(io.NodeOutput))
    expect("Hidden.unique_id", io.Hidden.unique_id.value == ours.Hidden.unique_id.value)
    expect("get_node_list", inspect.iscoroutinefunction(ComfyExtension.get_node_list))
    for name in ("processing_interrupted", "throw_exception_if_processing_interrupted", "unload_all_models"):
        expect(name, not parameters(getattr(model_management, name)))
    expect("soft_empty_cache", callable(model_management.soft_empty_cache))
    expect("InterruptProcessingException", issubclass(model_management.InterruptProcessingException, BaseException))
    expect("ProgressBar", {"total", "node_id"} <= parameters(comfy_utils.ProgressBar))
    expect("update_absolute", {"value", "total", "preview"} <= parameters(comfy_utils.ProgressBar.update_absolute))
    expect("send_progress_text", {"text", "node_id"} <= parameters(server.PromptServer.send_progress_text))
    for name in ("add_model_folder_path", "get_folder_paths"):
        mine = parameters(getattr(stub("folder_paths"), name))
        expect(name, mine <= parameters(getattr(folder_paths, name)))
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    print("\n".join(differences()))  # noqa: T201
