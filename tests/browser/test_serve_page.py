"""The page of a service in Chromium: a picture and a prompt become a video that plays."""

import pytest
from support.services import picture, settings

from wanlab.serve.running import served

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with served(settings(tmp_path_factory.mktemp("service")), ray=False) as running:
        yield running


def fill(page, tmp_path, steps):
    (tmp_path / "cat.png").write_bytes(picture(width=96, height=64))
    page.get_by_text("tiny-wan2.2-i2v").wait_for()
    page.set_input_files("#file", tmp_path / "cat.png")
    page.fill("#prompt", "a cat jumps")
    page.fill("#steps", str(steps))


@pytest.mark.parametrize("width", [1280, 390])
def test_a_picture_becomes_a_video_that_plays(service, open_page, tmp_path, width):
    page = open_page(f"{service.url}/#token={service.token}", width=width, allowed=(service.url,))
    fill(page, tmp_path, 20)
    page.click("#go")
    page.get_by_text("Done.").wait_for()
    page.wait_for_function("document.querySelector('video').currentTime > 0.05")
    played = page.evaluate("(v => [v.videoWidth, v.videoHeight])(document.querySelector('video'))")
    assert played == [64, 64]
    assert service.token not in page.url
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / "page.png", full_page=True)


def test_a_video_is_cancelled_from_the_page(service, open_page, tmp_path):
    page = open_page(f"{service.url}/#token={service.token}", allowed=(service.url,))
    fill(page, tmp_path, 100)
    page.select_option("#size", index=1)
    page.click("#go")
    page.get_by_text("Step ").wait_for()
    page.click("#cancel")
    page.get_by_text("cancelled by the caller").wait_for()


def test_without_the_token_the_page_asks_for_it(service, browser):
    context = browser.new_context()
    page = context.new_page()  # the refusal is an error of its console
    page.goto(service.url)
    page.get_by_label("Token of the service").fill(service.token)
    page.get_by_label("Token of the service").press("Tab")
    page.get_by_text("tiny-wan2.2-i2v").wait_for()
    assert not page.get_by_label("Token of the service").is_visible()
    context.close()
