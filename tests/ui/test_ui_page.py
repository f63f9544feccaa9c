"""The page in headless Chromium, as a person uses it: keyboard, cancelling, dropped pictures, phone, dark mode."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import mindomni_rt
from ui.conftest import Served

sync_api = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright (dev extra)")
RIDDLE = "draw (1 + 2) things of the colour of a lemon, shaped like a wheel"
THINKING = "1 + 2 = 3. a lemon is yellow. a wheel is a circle."
PATIENCE = 90  # seconds until a wait is given up: the machine may be busy with other tests
_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Collects what the status line, the thinking and the picture have shown, in order.
RECORD = """() => {
  window.seen = {status: [], thinking: [], picture: []};
  const add = (list, value) => { if (value && list[list.length - 1] !== value) list.push(value); };
  window.noted = setInterval(() => {
    add(seen.status, document.querySelector('#generate-status')?.innerText.trim());
    add(seen.thinking, document.querySelector('#generate-thinking textarea')?.value);
    add(seen.picture, document.querySelector('#generate-picture img')?.src);
  }, 10);
}"""
# Pairs of (text, contrast) of the text that we lay out, against the first background behind it.
CONTRAST = """(selectors) => {
  const lum = (c) => { const f = c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
  const rgb = (s) => s.match(/[\\d.]+/g).map(Number);
  return selectors.map(selector => {
    const element = document.querySelector(selector);
    let behind = element, back = [0, 0, 0, 0];
    while (behind && (back[3] ?? 1) === 0) { back = rgb(getComputedStyle(behind).backgroundColor); behind = behind.parentElement; }
    const [a, b] = [lum(rgb(getComputedStyle(element).color)), lum(back)].sort((x, y) => y - x);
    return [selector, (a + .05) / (b + .05)];
  });
}"""  # noqa: E501


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    with sync_api.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).is_file():
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Callable[..., Any]]:
    """Opens the page. Requests that would leave this machine are stopped, and fail the test."""
    contexts, outside = [], []

    def guard(route: Any) -> None:
        if route.request.url.startswith((served.address, "data:", "blob:")):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **options})
        contexts.append(context)
        context.route("**/*", guard)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(served.address)
        page.wait_for_selector("#generate-prompt textarea")
        return page

    yield open_page
    for context in contexts:
        context.close()
    served.recorder.slow.clear()
    served.recorder.wait_until_idle(PATIENCE)
    assert not outside and not served.outside


def paint(page: Any, prompt: str, tab: str = "generate") -> None:
    """Types a prompt, presses Enter and waits for the end."""
    pictures = len(page.query_selector_all("#history img"))
    page.fill(f"#{tab}-prompt textarea", prompt)
    page.press(f"#{tab}-prompt textarea", "Enter")
    page.wait_for_function("(n) => document.querySelectorAll('#history img').length > n", arg=pictures)
    wait_for_status(page, "Done in", tab)


def wait_for_status(page: Any, text: str, tab: str = "generate") -> None:
    page.wait_for_function(
        "([tab, text]) => document.querySelector(`#${tab}-status`).innerText.includes(text)", arg=[tab, text]
    )


def set_steps(page: Any, steps: int) -> None:
    if not page.get_by_role("spinbutton", name="Steps").is_visible():
        page.locator("#generate-settings > button").click()
    page.get_by_role("spinbutton", name="Steps").fill(str(steps))
    page.get_by_role("spinbutton", name="Steps").press("Tab")


def save(page: Any, folder: Path, picture: str = "#generate-picture") -> Path:
    """The picture as the download button gives it."""
    with page.expect_download() as waiting:
        page.click(
            f"{picture} a[download], {picture} button[aria-label='Download'], {picture} button[title='Download']"
        )
    target = folder / waiting.value.suggested_filename
    waiting.value.save_as(target)
    return target


def shows(page: Any, picture: Any, folder: Path, selector: str = "#generate-picture") -> bool:
    """The page comes to show this picture: the status can be there a moment before it."""
    end = time.monotonic() + PATIENCE
    while not equal(save(page, folder, selector), picture):
        if time.monotonic() > end:
            return False
        time.sleep(0.3)
    return True


def equal(path: Path, picture: Any) -> bool:
    return np.array_equal(np.asarray(Image.open(path).convert("RGB")), np.asarray(picture))


def test_generate(
    visit: Callable[..., Any], pipe: mindomni_rt.Pipeline, served: Served, tmp_path: Path, screenshots: Path
) -> None:
    page = visit()
    served.recorder.slow.set()
    page.evaluate(RECORD)
    paint(page, RIDDLE)
    page.wait_for_timeout(300)
    page.screenshot(path=screenshots / "generate.png", full_page=True)
    readable(page)
    seen = page.evaluate("seen")
    statuses = [status.split(" ")[0].rstrip(":") for status in seen["status"]]
    assert statuses.index("Thinking") < statuses.index("Painting") < statuses.index("Done")
    # Parts before the whole; how many of them a browser draws depends on how busy the machine is.
    assert len(seen["thinking"]) > 1 and all(THINKING.startswith(text.strip()) for text in seen["thinking"])
    assert seen["thinking"][-1].strip() == THINKING
    assert page.input_value("#generate-answer textarea").strip() == "three yellow circles"
    assert len(seen["picture"]) > 1  # previews, of which a busy browser draws some, then the picture
    path = save(page, tmp_path)
    settings = mindomni_rt.read_settings(path)
    assert settings["prompt"] == RIDDLE and settings["seed"] == int(seen["status"][-1].split()[-1])
    assert equal(path, pipe.generate(RIDDLE, seed=settings["seed"]).images[0])

    page.click("#generate-reuse-seed")
    page.wait_for_function("(s) => document.querySelector('#generate-seed input, #generate-seed textarea').value === s", arg=str(settings["seed"]))  # noqa: E501  # fmt: skip
    served.recorder.slow.clear()
    paint(page, RIDDLE)
    assert shows(page, Image.open(path), tmp_path / "again")
    paint(page, RIDDLE.replace("1 + 2", "1 + 4"))
    assert len(page.query_selector_all("#history img")) == 3
    page.locator("#history button.thumbnail-item, #history .thumbnail-lg").nth(2).click()
    assert shows(page, Image.open(path), tmp_path / "chosen")
    page.click("#settings-of > button")
    page.wait_for_function("document.querySelector('#settings')?.innerText?.includes('num_inference_steps')")
    assert f'"{RIDDLE}"' in page.inner_text("#settings")
    address = page.get_attribute("#generate-picture img", "src")
    assert httpx.get(address).status_code == 200
    page.close()
    end = time.monotonic() + PATIENCE
    while httpx.get(address).status_code == 200:
        assert time.monotonic() < end, "the picture of a closed page is still there"
        time.sleep(0.2)


def test_escape_cancels_the_request_itself(visit: Callable[..., Any], served: Served, screenshots: Path) -> None:
    page = visit()
    served.recorder.slow.set()
    set_steps(page, 1000)
    page.fill("#generate-prompt textarea", RIDDLE)
    page.press("#generate-prompt textarea", "Enter")
    wait_for_status(page, "of 1000")
    page.screenshot(path=screenshots / "running.png")
    page.keyboard.press("Escape")
    wait_for_status(page, "Cancelled")
    served.recorder.wait_until_idle(PATIENCE)
    assert 0 < served.recorder.steps[-1] < 900
    page.wait_for_timeout(300)
    wait_for_status(page, "Cancelled")  # nothing that was under way has written over it
    page.screenshot(path=screenshots / "cancelled.png")
    served.recorder.slow.clear()
    set_steps(page, 20)
    paint(page, RIDDLE)  # the page and the device are ready for the next


def test_cancel_button_and_a_closed_page_end_requests(visit: Callable[..., Any], served: Served) -> None:
    page, other = visit(), visit()
    served.recorder.slow.set()
    for open_page in (page, other):
        set_steps(open_page, 1000)
    page.fill("#generate-prompt textarea", RIDDLE)
    page.click("#generate-submit")
    wait_for_status(page, "of 1000")
    before = len(served.recorder.steps)
    other.fill("#generate-prompt textarea", RIDDLE)
    other.click("#generate-submit")  # waits for the first one
    wait_for_status(other, "Waiting for the device")
    other.click("#generate-cancel")
    wait_for_status(other, "Cancelled")
    page.click("#generate-cancel")
    wait_for_status(page, "Cancelled")
    served.recorder.wait_until_idle(PATIENCE)
    page.wait_for_timeout(300)
    assert len(served.recorder.steps) == before  # the one that waited has never begun
    page.click("#generate-submit")
    wait_for_status(page, "of 1000")
    page.close()
    served.recorder.wait_until_idle(PATIENCE)
    assert served.recorder.steps[-1] < 1000


def drop(page: Any, selector: str, path: Path) -> None:
    """A file let fall onto an element, as the mouse does it."""
    data = page.evaluate_handle(
        """([data, name]) => { const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
        transfer.items.add(new File([bytes], name, {type: 'image/png'})); return transfer; }""",
        [base64.b64encode(path.read_bytes()).decode(), path.name],
    )
    for kind in ("dragenter", "dragover", "drop"):
        page.dispatch_event(selector, kind, {"dataTransfer": data})


def test_dropped_picture_restores_its_settings(
    visit: Callable[..., Any], pipe: mindomni_rt.Pipeline, served: Served, tmp_path: Path
) -> None:
    made = pipe.generate(
        RIDDLE, seed=2**60 + 1, height=96, width=112, num_inference_steps=12, guidance_scale=1.5, solver="multistep",
        negative_prompt="blue", max_new_tokens=40,
    )  # fmt: skip
    (path,) = made.save(tmp_path / "made.png")
    page = visit()
    drop(page, "#drop button", path)
    wait_for_status(page, "The controls have the settings")
    assert page.input_value("#generate-prompt textarea") == RIDDLE
    page.click("#generate-submit")
    wait_for_status(page, f"seed {2**60 + 1}")
    assert shows(page, Image.open(path), tmp_path / "restored")
    plain = tmp_path / "plain.png"
    Image.new("RGB", (32, 32)).save(plain)
    page.reload()
    page.wait_for_selector("#drop button")
    page.wait_for_timeout(500)
    drop(page, "#drop button", plain)
    page.wait_for_selector("text=plain.png carries no settings of this program")


def test_edit_and_ask(visit: Callable[..., Any], pipe: mindomni_rt.Pipeline, tmp_path: Path, screenshots: Path) -> None:
    page = visit()
    page.fill("#generate-seed input, #generate-seed textarea", "7")
    paint(page, RIDDLE)
    before = save(page, tmp_path)
    page.click("#to-edit")
    page.wait_for_selector("#edit-prompt textarea")
    page.fill("#edit-seed input, #edit-seed textarea", "7")
    paint(page, "the same, but one more and in the colour of the sea", "edit")
    assert page.input_value("#edit-answer textarea").strip() == "four blue circles"
    page.screenshot(path=screenshots / "edit.png", full_page=True)
    expected = pipe.edit(Image.open(before), "the same, but one more and in the colour of the sea", seed=7)  # fmt: skip
    assert shows(page, expected.images[0], tmp_path / "edited", "#edit-picture")
    page.click("#to-ask")
    page.wait_for_selector("#ask-prompt textarea")
    page.get_by_role("button", name="describe the picture.").click()
    page.wait_for_function("document.querySelector('#ask-prompt textarea').value === 'describe the picture.'")
    page.press("#ask-prompt textarea", "Enter")
    wait_for_status(page, "Done in", "ask")
    assert page.input_value("#ask-answer textarea").strip() == "four blue circles"
    page.screenshot(path=screenshots / "ask.png", full_page=True)


def test_mistakes_are_shown_with_our_message(visit: Callable[..., Any]) -> None:
    page = visit()
    page.press("#generate-prompt textarea", "Enter")
    page.wait_for_selector("text=the prompt is empty")
    page.fill("#generate-prompt textarea", RIDDLE)
    page.fill("#generate-seed input, #generate-seed textarea", "seven")
    page.press("#generate-prompt textarea", "Enter")
    page.wait_for_selector("text=expected a whole number")
    page.get_by_role("tab", name="Edit").click()
    page.fill("#edit-prompt textarea", "the same picture")
    page.press("#edit-prompt textarea", "Enter")
    page.wait_for_selector("text=there is no picture to change")


def test_keyboard_reaches_everything(visit: Callable[..., Any]) -> None:
    page = visit()
    assert page.evaluate("document.activeElement.closest('#generate-prompt') !== null")  # ready to type
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]')?.id ?? ''"))
        reached.append(page.evaluate("document.activeElement.id"))
    ids = ("generate-submit", "generate-cancel", "generate-reuse-seed", "reuse", "to-edit", "to-ask")
    assert [name for name in ids if name not in reached] == []
    assert reached.index("generate-submit") < reached.index("generate-cancel") < reached.index("generate-reuse-seed")
    page.get_by_role("button", name="draw (7 - 2) things").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#generate-prompt textarea').value.includes('7 - 2')")


def test_phone(visit: Callable[..., Any], screenshots: Path) -> None:
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    paint(page, RIDDLE)
    page.wait_for_timeout(300)
    page.screenshot(path=screenshots / "phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    top = {name: page.locator(f"#generate-{name}").bounding_box()["y"] for name in ("submit", "status", "picture", "examples")}  # noqa: E501  # fmt: skip
    assert top["submit"] < top["status"] < top["picture"] < top["examples"]
    for tab in ("Edit", "Ask"):
        page.get_by_role("tab", name=tab).tap()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.screenshot(path=screenshots / f"phone-{tab.lower()}.png", full_page=True)
    low = page.evaluate("[...document.querySelectorAll('button.primary, button.secondary')].filter(b => b.offsetParent && b.offsetHeight < 28).length")  # noqa: E501  # fmt: skip
    assert low == 0  # large enough for a finger


def readable(page: Any) -> None:
    """Contrast of at least 4.5, as WCAG asks of text."""
    kinds = ("status span", "submit", "cancel", "examples button", "prompt textarea", "thinking textarea")
    selectors = ["#head h1", "#head p", "#reuse", *(f"#generate-{kind}" for kind in kinds)]
    assert [pair for pair in page.evaluate(CONTRAST, selectors) if pair[1] < 4.5] == []


def test_dark_mode(visit: Callable[..., Any], screenshots: Path) -> None:
    page = visit(color_scheme="dark")
    paint(page, RIDDLE)
    page.wait_for_timeout(300)
    page.screenshot(path=screenshots / "dark.png", full_page=True)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(v => v < 64)")
    readable(page)
