"""The page that `dyvte app` serves, as a browser sees it, and what it does with what people send."""

from __future__ import annotations

import io
import socket
import struct
import zlib

import pytest
from browser import check_quiet, chromium, needs_browser, wait
from PIL import Image

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")

from dyvte.cli.app import prepare  # noqa: E402
from dyvte.cli.configs import AppConfig  # noqa: E402
from dyvte.evaluation.side_by_side import Comparison  # noqa: E402
from dyvte.integrations.app import read_upload, serve, show  # noqa: E402


@pytest.fixture(scope="module")
def page():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked, samples, config = prepare(AppConfig(port=port, megabytes=1, threads=1))
    served = serve(asked, samples, config, block=False)
    yield f"http://127.0.0.1:{port}", asked, samples
    served.close()


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, False), (390, True)])
def test_ask_gives_both_answers(page, width, dark):
    address, asked, samples = page
    expected = asked.ask(samples[1].images[0], samples[1].question, 0.01)
    with chromium(width, dark) as driver:
        driver.get(address)
        wait(lambda: driver.find_elements("css selector", "#ask"))
        wait(lambda: len(driver.find_elements("css selector", "#examples tbody tr img")) == len(samples))
        question = driver.find_element("css selector", "#question textarea, #question input")
        row = driver.find_element("css selector", "#examples tbody tr:nth-child(2)")
        driver.execute_script("arguments[0].click()", row)
        wait(lambda: question.get_property("value") == samples[1].question)
        driver.execute_script("arguments[0].click()", driver.find_element("id", "ask"))
        wait(lambda: driver.find_elements("id", "answer-dense"))
        said = [driver.find_element("id", name).text for name in ("answer-exits", "answer-dense")]
        assert said == [expected.answer, expected.dense]
        assert len(driver.find_elements("css selector", ".strip .saw")) == expected.exit_layer
        assert len(driver.find_elements("css selector", ".strip span")) == expected.num_layers
        assert driver.find_element("css selector", "#result figure img").size["width"] > 200
        check_quiet(driver)


@needs_browser
def test_a_fault_is_a_sentence_on_the_page(page):
    with chromium(390) as driver:
        driver.get(page[0])
        question = wait(lambda: driver.find_elements("css selector", "#question textarea, #question input"))[0]
        wait(lambda: question.get_property("value"))
        driver.execute_script("arguments[0].value = ' '; arguments[0].dispatchEvent(new Event('input'))", question)
        driver.execute_script("arguments[0].click()", driver.find_element("id", "ask"))
        fault = wait(lambda: driver.find_elements("css selector", "#result .fault"))[0]
        assert fault.text == "Write a question first."
        check_quiet(driver)


def test_it_listens_on_loopback_takes_no_large_file_and_reads_none_of_the_machine(page, tmp_path):
    address, _, samples = page
    with pytest.raises(ConnectionRefusedError), socket.socket() as elsewhere:
        elsewhere.connect(("127.0.0.2", int(address.rpartition(":")[2])))  # where 0.0.0.0 would answer, too
    upload = {"files": ("large.png", b"0" * 1_100_000)}
    assert httpx.post(f"{address}/gradio_api/upload", files=upload).status_code == 413
    samples[0].images[0].save(tmp_path / "private.png")
    given = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
    call = httpx.post(f"{address}/gradio_api/call/ask", json={"data": [given, samples[0].question, 1]}).json()
    events = httpx.get(f"{address}/gradio_api/call/ask/{call['event_id']}", timeout=60).text
    assert "event: error" in events and "event: complete" not in events


def head_of_png(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(kind, side=64):
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "Choose an image first"),
        (b"just text", "no image in JPEG, PNG or WebP"),
        (encoded("GIF"), "no image in JPEG, PNG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image in JPEG, PNG or WebP"),
        (head_of_png(7_000, 6_000), "more than the 40 megapixels"),
        (head_of_png(60_000, 60_000), "more than the 40 megapixels"),
        (encoded("JPEG")[:900], "cannot be read"),
    ],
)
def test_files_that_are_not_taken(tmp_path, content, sentence):
    path = None
    if content is not None:
        path = tmp_path / "upload.png"
        path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_upload(path, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_files_that_are_taken_whatever_their_name(tmp_path, kind):
    (tmp_path / "upload").write_bytes(encoded(kind))
    picture = read_upload(tmp_path / "upload", 40)
    assert picture.mode == "RGB" and picture.size == (64, 64)


def test_what_a_model_says_is_text():
    evil = "<script>alert(1)</script>"
    shown = show(Comparison(evil, "$x$ & y", 2, 32, 576, 20, 0.5, 0.05, 1.2, 0.3, None))
    assert "<script" not in shown and "&lt;script&gt;" in shown and "$x$ &amp; y" in shown
    assert (
        "With exits: changed" in shown
        and "left after layer 2 of 32" in shown
        and "50\xa0ms" in shown
        and "1.20\xa0s" in shown
        and "no plain grid" in shown
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "some/model"}, "needs heads=FOLDER"),
        ({"loader": "a:b"}, "models of transformers"),
        ({"host": "192.0.2.1"}, "cannot be listened on .*choose another port or host"),
        ({"risk": 1e-5}, "cannot show a risk as low"),
        ({"heads": "nowhere"}, "no checkpoint in nowhere"),
        ({"data": {"scenes": {"split": "nowhere", "n": 6}}}, "nowhere"),
    ],
)
def test_settings_that_do_not_fit(changes, match):
    with pytest.raises(ValueError, match=match):
        prepare(AppConfig(**changes))


def test_a_port_that_is_taken(page):
    with pytest.raises(ValueError, match="cannot be listened on .*choose another port"):
        prepare(AppConfig(port=int(page[0].rpartition(":")[2])))


def test_the_interface_for_programs_is_documented(page):
    assert list(httpx.get(f"{page[0]}/gradio_api/info").json()["named_endpoints"]) == ["/ask"]
