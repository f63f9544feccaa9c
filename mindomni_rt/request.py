"""What a caller may ask for: every field with its default, its limits and its meaning, checked before any work."""

from __future__ import annotations

import difflib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from .backends.base import FIRST_STEPS, OPTIONAL
from .checkpoint.config import EDIT_FEATURES, PUBLISHED, Guidance, RecommendedConfig, Side, Steps
from .checkpoint.config import MAX_SIDE as MAX_SIDE
from .checkpoint.config import MAX_STEPS as MAX_STEPS
from .checks import UNSET, Many, Number, OneOf, Unset, Whole, check_fields, shown
from .errors import BadRequestError
from .inputs.images import DEFAULT_IMAGE_TOKENS, open_image
from .inputs.prompts import DEFAULT_NEGATIVE, IMAGE_TOKEN
from .sampling.schedule import SOLVERS

logger = logging.getLogger(__name__)
R = TypeVar("R", "Request", "UnderstandRequest")
MAX_TEXT = 2**19  # characters; a context of 128,000 tokens holds about as many
MAX_PIXELS = 2**27  # of all images of a request: 128 of 1024x1024
RECORDED = ("backend", "dtype", "adapters", "text", "mindomni_rt")  # in the settings of a picture, beside its request
OUTPUTS = ("pil", "numpy")
Seed = Annotated[int | None, Whole(-(2**63), 2**64 - 1)]
NewTokens = Annotated[int, Whole(1, 2**21)]
Temperature = Annotated[float, Number(0, 100)]
ImageTokens = Annotated[int | None, Whole(4, 2**20)]


@dataclass(frozen=True, kw_only=True)
class UnderstandRequest:
    """Arguments of `Pipeline.understand`. Raises BadRequestError naming the field that cannot be served."""

    prompt: str
    """The question. Lone surrogates, as a shell makes of bytes that are no UTF-8, become U+FFFD."""
    image: Any = None
    """A picture to ask about: path, bytes, file object, data URI, PIL image or uint8 array."""
    max_new_tokens: NewTokens = 512
    """Tokens at most; the text ends earlier at an end token. Cut to what the context leaves, with a warning."""
    temperature: Temperature = 0.0
    """0 is greedy; above it tokens are sampled from softmax(scores / temperature). 0.001 at least, if not 0."""
    seed: Seed = None
    """Of the sampled tokens; None draws one, which the result tells."""
    max_image_tokens: ImageTokens = DEFAULT_IMAGE_TOKENS
    """A picture of more tokens is reduced, with a warning; None leaves the checkpoint's own limit."""

    def __post_init__(self) -> None:
        check_fields(self, BadRequestError)
        _clean_text(self, "prompt")
        _require_prompt(self.prompt)
        _require_temperature(self.temperature)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arguments of `Pipeline.generate`. Raises BadRequestError naming the field that cannot be served.

    Size, steps and guidance that are left out are the model's own: `complete` takes them from its configuration.
    """

    prompt: str
    """What to paint, or how to change `image`."""
    image: Any = None
    """A reference image: path, bytes, file object, data URI, PIL image or uint8 array."""
    think: bool = True
    """Reason in words first, as the model was trained to."""
    cascade: bool = False
    """A second round of thinking on the first one's answer; needs think."""
    height: Side | None = None
    """Pixels, a multiple of 16. None is that of `latents`, of `image` within what the model paints, or the model's."""
    width: Side | None = None
    """As height."""
    num_inference_steps: Steps | None = None
    """Denoising steps, None the model's; the time tokens of all of them are computed in one pass."""
    guidance_scale: Guidance | Unset = UNSET
    """Classifier-free guidance. Left out (`UNSET`) it is the model's; 1 is none: the guided branch alone, in half the
    time. None is refused, because it could mean either."""
    negative_prompt: str = DEFAULT_NEGATIVE
    """What the unguided branch is given. None is the default; "" is no text at all."""
    seed: Seed = None
    """Image i is painted from seed + i; None draws one, which the result tells."""
    latents: NDArray[np.float32] | None = None
    """Noise to start from instead: (num_images, 4, height / 8, width / 8), an array or tensor of any float type."""
    max_new_tokens: NewTokens = 512
    """Tokens of each round of thinking, at most."""
    temperature: Temperature = 0.0
    """0 is greedy; above it tokens are sampled from softmax(scores / temperature). 0.001 at least, if not 0."""
    first_step: Annotated[str, OneOf(FIRST_STEPS)] = "full"
    """ "full" is the model as trained; "condition_only" what the released code does with its cache on."""
    edit_features: Annotated[str | None, OneOf(EDIT_FEATURES)] = None
    """What is taken from the reference image: "vit", or "vit+vae" on checkpoints trained with it; None is its own."""
    num_images: Annotated[int, Whole(1, 256)] = 1
    """Images of one prompt; their pixels together are at most MAX_PIXELS."""
    max_image_tokens: ImageTokens = DEFAULT_IMAGE_TOKENS
    """A reference image of more tokens is reduced, with a warning; None leaves the checkpoint's own limit."""
    preview_every: Annotated[int, Whole(0, MAX_STEPS)] = 0
    """A preview each so many steps; 0 is none."""
    output: Annotated[str, OneOf(OUTPUTS)] = "pil"
    """ "pil" images, or "numpy" float32 (n, H, W, 3) in [0, 1]."""
    guidance_interval: Annotated[tuple[float, float], Many(Number(0, 1), 2, 2)] = (0.0, 1.0)
    """Lossy: only steps that begin in [start, end) are guided."""
    solver: Annotated[str, OneOf(SOLVERS)] = "euler"
    """Lossy: "multistep" is of second order, for 25 to 28 steps."""
    step_cache: Annotated[float, Number(0, 1e9)] = 0.0
    """Lossy: a step that changes less than this reuses most of the one before; 0 is off."""
    draft_tokens: Annotated[int, Whole(0, 16)] = 0
    """Tokens guessed and verified at once while thinking; the text stays the same. 0 is off."""

    def __post_init__(self) -> None:
        if self.negative_prompt is None:
            object.__setattr__(self, "negative_prompt", DEFAULT_NEGATIVE)
        if self.guidance_scale is None:
            raise BadRequestError(
                "guidance_scale = None: expected a number; leave it out for the model's own, or give 1 for no guidance"
            )
        check_fields(self, BadRequestError)
        for name in ("prompt", "negative_prompt"):
            _clean_text(self, name)
        _require_prompt(self.prompt)
        _require_temperature(self.temperature)
        if self.cascade and not self.think:
            raise BadRequestError("cascade thinking needs think=True")
        start, end = self.guidance_interval
        if not start < end:
            raise BadRequestError(
                f"guidance_interval = {self.guidance_interval}: expected (start, end), start below end"
            )
        if self.latents is not None:
            object.__setattr__(self, "latents", _as_noise(self.latents))
        if self.height is not None and self.width is not None:
            self._check_size(self.width, self.height)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(n, 4, H/8, W/8) of a request whose size is known."""
        assert self.height is not None and self.width is not None, "complete the request first"
        return self.num_images, 4, self.height // 8, self.width // 8

    def _check_size(self, width: int, height: int) -> None:
        if self.num_images * height * width > MAX_PIXELS:
            raise BadRequestError(
                f"num_images = {self.num_images} of {width}x{height} pixels: expected at most {MAX_PIXELS} "
                "pixels in all; ask for fewer at a time"
            )
        shape = (self.num_images, 4, height // 8, width // 8)
        if self.latents is not None and self.latents.shape != shape:
            raise BadRequestError(f"latents of shape {self.latents.shape}: expected {shape} float32")

    def optional(self) -> list[str]:
        """Options in use that a backend may lack."""
        defaults = {f.name: f.default for f in fields(self)}
        return [name for name in OPTIONAL if getattr(self, name) != defaults[name]]

    def settings(self) -> dict[str, Any]:
        """What repeats the request, as plain data: everything but images, latents and what is UNSET."""
        left_out = ("image", "latents", "output", "preview_every")
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return {name: value for name, value in found.items() if value is not UNSET}


@dataclass(frozen=True, kw_only=True)
class CompleteRequest(Request):
    """A request whose size, steps and guidance are known. `complete` makes one."""

    height: Side
    width: Side
    num_inference_steps: Steps
    guidance_scale: Guidance


def complete(request: Request, recommended: RecommendedConfig) -> CompleteRequest:
    """The request with the model's recommendations in place of None and UNSET. The one place that does so.

    A size that the model was not trained for is logged, with the one that is recommended.
    """
    if isinstance(request, CompleteRequest):
        return request
    given = {f.name: getattr(request, f.name) for f in fields(request)}
    width, height = recommended.width, recommended.height
    if request.image is not None and (request.width is None or request.height is None):
        given["image"] = open_image(request.image)  # once: a file object can be read only once
        width, height = edit_size(given["image"].width, given["image"].height, recommended)
    if request.latents is not None:
        height, width = (8 * side for side in request.latents.shape[2:])
    unset = {
        "width": width,
        "height": height,
        "num_inference_steps": recommended.num_inference_steps,
        "guidance_scale": recommended.guidance_scale,
    }
    found = CompleteRequest(**given | {name: value for name, value in unset.items() if given[name] in (None, UNSET)})
    if not recommended.covers(found.width, found.height):
        logger.warning(
            "size %dx%d: this model was %s; recommended is %dx%d",
            found.width, found.height, recommended.range(), recommended.width, recommended.height,
        )  # fmt: skip
    return found


class UnderstandOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.understand`: the fields of `UnderstandRequest` beside prompt and image."""

    max_new_tokens: int
    temperature: float
    seed: int | None
    max_image_tokens: int | None


class EditOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.edit`: the fields of `Request` beside prompt and image, in its order."""

    think: bool
    cascade: bool
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | Unset
    negative_prompt: str | None
    seed: int | None
    latents: Any
    max_new_tokens: int
    temperature: float
    first_step: str
    edit_features: str | None
    num_images: int
    max_image_tokens: int | None
    preview_every: int
    output: str
    guidance_interval: tuple[float, float]
    solver: str
    step_cache: float
    draft_tokens: int


class GenerateOptions(EditOptions, total=False):
    """Keyword arguments of `Pipeline.generate`: the fields of `Request` beside the prompt."""

    image: Any


def as_request(kind: type[R], prompt: Any, options: Mapping[str, Any]) -> R:
    """A request from a prompt and options, or the given one. Raises BadRequestError, also for unknown options.

    What a picture's settings record beside the request (RECORDED) is left out, so that they repeat it.
    """
    if kind is Request and isinstance(prompt, (list, tuple)):
        raise BadRequestError(f"prompt = {shown(prompt)}: expected one text; `generate_batch` takes several")
    names = [f.name for f in fields(kind)]
    options = {name: value for name, value in options.items() if name not in RECORDED}
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1) or [known for known in names if name in known][:1]
            hint = f"; did you mean {near[0]}?" if near else f"; expected some of {', '.join(names)}"
            raise BadRequestError(f"there is no option {shown(name)}{hint}")
    if isinstance(prompt, kind):
        if options:
            raise BadRequestError(f"options {', '.join(options)} beside a {kind.__name__}: put them into it")
        return prompt
    return kind(prompt=prompt, **options)


def edit_size(width: int, height: int, recommended: RecommendedConfig = PUBLISHED) -> tuple[int, int]:
    """The size (width, height) at which an image is edited: its own in multiples of 16, within what the model paints.

    That is at most as many pixels as its recommended size has, and the sides that it was trained for.
    """
    low, high = recommended.trained_sides or (16, MAX_SIDE)
    scale = min(1.0, (recommended.width * recommended.height / (width * height)) ** 0.5)
    sides = (min(max(round(side * scale / 16) * 16, low), high) for side in (width, height))
    return next(sides), next(sides)


def check_callback(callback: Any) -> Callable[..., Any] | None:
    """A callable or None. Raises BadRequestError."""
    if callback is not None and not callable(callback):
        raise BadRequestError(f"callback = {shown(callback)}: expected a function that takes an event, or None")
    return callback  # type: ignore[no-any-return]


def check_cancel(cancel: Any) -> threading.Event | None:
    """Something with is_set(), such as threading.Event, or None. Raises BadRequestError."""
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise BadRequestError(f"cancel = {shown(cancel)}: expected a threading.Event, or None")
    return cancel  # type: ignore[no-any-return]


def clean_text(text: str) -> str:
    """Surrogate pairs joined, lone surrogates as U+FFFD: what every tokenizer and file can take."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _clean_text(owner: Any, name: str) -> None:
    given = getattr(owner, name)
    text = clean_text(given)
    if text != given and "\ufffd" in text:
        logger.warning("%s holds what is no Unicode text; it was replaced by U+FFFD", name)
    if len(text) > MAX_TEXT:
        raise BadRequestError(f"{name} has {len(text)} characters; expected at most {MAX_TEXT}")
    if IMAGE_TOKEN in text:
        raise BadRequestError(f"{name} holds the image placeholder {IMAGE_TOKEN}; write no {IMAGE_TOKEN} into it")
    object.__setattr__(owner, name, text)


def _require_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise BadRequestError("the prompt is empty; write what is asked for")


def _require_temperature(temperature: float) -> None:
    if 0 < temperature < 0.001:
        raise BadRequestError(f"temperature = {temperature:g}: expected 0 (greedy) or at least 0.001")


def _as_noise(latents: Any) -> NDArray[np.float32]:
    """An array or tensor as float32 on the host. A tensor's gradient is not followed."""
    shape = "(num_images, 4, height / 8, width / 8)"
    try:
        if len(getattr(latents, "shape", np.shape(latents) if isinstance(latents, (list, tuple)) else ())) != 4:
            raise BadRequestError(f"latents = a {type(latents).__name__}: expected an array of shape {shape}")
        if hasattr(latents, "detach"):
            if latents.is_complex():
                raise TypeError
            latents = latents.detach().cpu().float().numpy()
        if np.asarray(latents).dtype.kind not in "fiu":
            raise TypeError
        values = np.ascontiguousarray(latents, np.float32)
    except BadRequestError:
        raise
    except (TypeError, ValueError, RuntimeError):
        raise BadRequestError(f"latents = a {type(latents).__name__}: expected real numbers, {shape} float32") from None
    if not np.isfinite(values).all() or np.abs(values).max() > 1e4:
        raise BadRequestError("latents hold NaN, infinity or numbers above 10000: expected standard normal noise")
    return values
