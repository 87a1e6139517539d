"""The web page: through its client, and in a browser."""

from __future__ import annotations

import re
import socket
import struct
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from percov2 import Codec
from percov2.cli.main import main
from percov2.demo.answers import Answers
from tools.photos import noise, png

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
THREADS = 4


@pytest.fixture(scope="module")
def codec(random_model):
    return Codec.from_pretrained(random_model)


@pytest.fixture(scope="module")
def address(codec):
    from percov2.demo.page import make_page

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = make_page(Answers(codec, 100_000))
    settings = {"quiet": True, "prevent_thread_lock": True, "max_file_size": 1 << 20}
    _, url, _ = page.launch(server_name="127.0.0.1", server_port=port, **settings)
    yield url
    page.close()


@pytest.fixture(scope="module")
def client(address):
    return gradio_client.Client(address, verbose=False)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a photo.png"
    noise(96, 64).save(path)
    return path


def compress(client, path, rate="fine", target=0):
    """Return the paths of both pictures, the sentence and the path of the file."""
    upload = gradio_client.handle_file(str(path))
    pictures, sentence, file, *_ = client.predict(upload, rate, target, 1.0, api_name="/compress")
    return pictures, sentence, file["value"] if isinstance(file, dict) else file


def restore(client, path):
    upload = gradio_client.handle_file(str(path))
    return client.predict(upload, 1.0, api_name="/restore")


def test_the_page_gives_what_the_codec_gives(client, codec, photo):
    (original, restored), sentence, file = compress(client, photo, "coarse")
    data = codec.compress(photo, rate="coarse")
    with open(file, "rb") as stream:
        assert stream.read() == data
    assert file.endswith("a photo.pcv2")
    assert f"**{len(data):,} bytes**" in sentence and "96×64 pixels, rate coarse" in sentence
    assert f"{8 * len(data) / (96 * 64):.4f} bpp" in sentence
    expected = np.asarray(codec.decompress(data))
    np.testing.assert_array_equal(np.asarray(Image.open(restored)), expected)
    np.testing.assert_array_equal(np.asarray(Image.open(original)), np.asarray(Image.open(photo)))
    picture, again = restore(client, file)
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), expected)
    assert again == sentence.partition(", 1 :")[0]


def test_target_bytes_and_cut_files(client, codec, photo, tmp_path):
    whole = codec.compress(photo)
    _, sentence, _file = compress(client, photo, target=len(whole) - 5)
    assert int(re.search(r"\*\*(\d+) bytes", sentence)[1]) <= len(whole) - 5
    assert re.search(
        r"\d+ of \d+ stages are from the file, and the model drew the others, 1 : ", sentence
    )
    cut = tmp_path / "cut.pcv2"
    cut.write_bytes(whole[:-5])
    picture, sentence = restore(client, cut)
    said = r"\*\*the file is damaged or cut: .*\*\*; \d+ of \d+ stages are from"
    assert re.search(said, sentence)
    expected = np.asarray(codec.decompress(whole[:-5], allow_truncated=True))
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), expected)


def large_png() -> bytes:
    """A valid header of 8000×8000 pixels, and few bytes of them."""
    header = struct.pack(">IIBBBBB", 8000, 8000, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(8001))), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("text.jpg", b"hello", "text.jpg: not a picture"),
        ("big.png", large_png(), "big.png: the picture has more pixels than the limit of 100000"),
        ("cut.png", png(noise(64, 64))[:-100], r"cut.png: .*truncated"),
        ("a&b.png", b"", "a&amp;b.png: "),
    ],
    ids=["text", "large", "cut", "empty"],
)
def test_wrong_photos_are_refused(client, tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(gradio_client.exceptions.AppError, match=message) as raised:
        compress(client, path)
    assert str(tmp_path) not in str(raised.value) and "/tmp" not in str(raised.value)


def test_wrong_files_are_refused(client, codec, photo, tmp_path):
    file = bytearray(codec.compress(photo))
    file[len(file) // 2] ^= 64
    for data, message in [(b"no", "wrong.pcv2: "), (bytes(file), "wrong.pcv2: .*damaged")]:
        path = tmp_path / "wrong.pcv2"
        path.write_bytes(data)
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            restore(client, path)
    with pytest.raises(gradio_client.exceptions.AppError, match="choose a photo first"):
        client.predict(None, "fine", 0, 1.0, api_name="/compress")


def test_users_at_once_get_their_own_pictures(address, codec, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(THREADS)]
    for i, path in enumerate(paths):
        noise(64 + 32 * i, 64, i).save(path)

    def use(path):
        client = gradio_client.Client(address, verbose=False)
        with open(compress(client, path)[2], "rb") as stream:
            return stream.read()

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(use, paths))
    assert found == [codec.compress(path) for path in paths]


def test_a_client_that_leaves_stops_nobody(address, client, photo):
    job = gradio_client.Client(address, verbose=False).submit(
        gradio_client.handle_file(str(photo)), "fine", 0, 1.0, api_name="/compress"
    )
    job.cancel()
    with socket.create_connection(("127.0.0.1", int(address.rstrip("/").rpartition(":")[2]))) as s:
        s.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\nhalf"
        )
    assert "bytes" in compress(client, photo)[1]


def test_the_page_compares_with_other_codecs(client, photo, codec):
    answers = Answers(codec)
    size = 600
    titles = [title for _, title in answers.rivals(photo.read_bytes(), size)]
    for name, title in zip(("JPEG", "WebP", "AVIF"), titles, strict=True):
        found = re.fullmatch(rf"{name}, (\d+) bytes|{name} needs more bytes", title)
        assert found and int(found[1] or 0) <= size
    assert any("bytes" in title and "more" not in title for title in titles)


def test_a_large_upload_is_refused_by_the_server(address, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(Exception, match=r"(?i)too large|413|exceed"):
        compress(gradio_client.Client(address, verbose=False), large)


def test_the_page_asks_nobody_else(address):
    text = urllib.request.urlopen(address).read().decode()
    assert "fonts.googleapis" not in text


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("percov2.extras.find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "pip install 'percov2[demo]'" in capsys.readouterr().err


def test_in_a_browser_a_photo_goes_there_and_back(address, browser, photo, tmp_path):
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    foreign, faults = [], []
    tab.on("request", lambda request: foreign.append(request.url))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.goto(address)
    tab.set_input_files("#photo input[type=file]", photo)
    tab.wait_for_selector("#photo .file-preview")
    tab.click("#compress")
    tab.wait_for_selector("#sentence strong")
    tab.wait_for_selector("#slider img")
    with tab.expect_download() as download:
        tab.click("#download")
    assert download.value.suggested_filename == "a photo.pcv2"
    data = download.value.path().read_bytes()
    handle, box = (
        tab.locator("#slider .outer").bounding_box(),
        tab.locator("#slider").bounding_box(),
    )
    tab.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] / 4, handle["y"] + handle["height"] / 2, steps=4)
    tab.mouse.up()
    assert tab.locator("#slider .outer").bounding_box()["x"] < handle["x"] - 50
    cut = tmp_path / "cut.pcv2"
    cut.write_bytes(data[:-5])
    tab.get_by_role("tab", name="Restore").click()
    tab.set_input_files("#file input[type=file]", cut)
    tab.wait_for_selector("#file .file-preview")
    tab.click("#restore")
    tab.wait_for_selector("#restored_sentence strong")
    assert "are from the file, and the model drew" in tab.inner_text("#restored_sentence")
    tab.click("#file [aria-label=Clear]")
    wrong = {"name": "x.pcv2", "mimeType": "", "buffer": b"x"}
    tab.set_input_files("#file input[type=file]", wrong)
    tab.wait_for_selector("#file .file-preview")
    tab.click("#restore")
    tab.wait_for_selector(".toast-body")
    assert "x.pcv2: " in tab.inner_text(".toast-body")
    assert not faults
    assert all(url.startswith((address, "data:", "blob:")) for url in foreign), foreign
