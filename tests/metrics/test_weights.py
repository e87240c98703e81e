"""Conversion of the published weights: checksum first, no code from pickles, loopback download."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from gensample.metrics.errors import InputError
from gensample.metrics.features import file_sha256, inception_extractor
from gensample.metrics.inception import InceptionV3
from gensample.metrics.weights import SHA256, URL, convert_weights, default_weights_path, download_weights


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, synthetic: ModuleType) -> Path:
    """A file of the published layout: our names, batch counters, and the classifier we do not use."""
    module = InceptionV3()
    state = synthetic.synthetic_state_dict(module)
    state["fc.weight"], state["fc.bias"] = torch.zeros(1008, 2048), torch.zeros(1008)
    path = tmp_path_factory.mktemp("published") / "pt_inception.pth"
    torch.save(state, path)
    return path


def test_conversion_keeps_the_network(published: Path, synthetic: ModuleType, tmp_path: Path) -> None:
    out = convert_weights(
        published, tmp_path / "sub" / "w.safetensors", sha256=file_sha256(published).upper()
    )
    tensors = load_file(out)
    assert not any(name.startswith("fc.") for name in tensors)
    extractor = inception_extractor(out)
    expected = synthetic.synthetic_state_dict(InceptionV3())
    actual = extractor.module.state_dict()
    assert all(torch.equal(actual[n], t) for n, t in expected.items())
    assert [p.name for p in out.parent.iterdir()] == ["w.safetensors"]


def test_default_checksum_is_that_of_the_published_file(published: Path, tmp_path: Path) -> None:
    assert SHA256[:8] in URL  # the name of the published file carries the first eight digits
    with pytest.raises(InputError, match=f"expected {SHA256}"):
        convert_weights(published, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(marker),)

    path = tmp_path / "evil.pth"
    torch.save({"Conv2d_1a_3x3.conv.weight": Payload()}, path)
    with pytest.raises(InputError, match="not a plain PyTorch state"):
        convert_weights(path, tmp_path / "w.safetensors", sha256=file_sha256(path))
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError, match="not a plain PyTorch state"):
        convert_weights(path, tmp_path / "w.safetensors", sha256=file_sha256(path))
    assert not marker.exists()


def test_other_weights_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="Conv2d_1a_3x3"):
        convert_weights(path, tmp_path / "w.safetensors", sha256=file_sha256(path))
    with pytest.raises(InputError, match="no such file"):
        convert_weights(tmp_path / "absent.pth", tmp_path / "w.safetensors")


def test_default_path_follows_the_cache_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_weights_path() == tmp_path / "gensample" / "inception-2015-12-05.safetensors"


@pytest.fixture
def server(published: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(published.parent))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()
        thread.join()


def test_download_checks_converts_and_leaves_nothing_else(
    server: str, published: Path, tmp_path: Path
) -> None:
    target = tmp_path / "cache" / "w.safetensors"
    right = hashlib.sha256(published.read_bytes()).hexdigest()
    with pytest.raises(InputError, match="discarded"):
        download_weights(target, url=server + published.name, sha256="0" * 64)
    with pytest.raises(InputError, match="download failed"):
        download_weights(target, url=server + "nothing", sha256=right)
    assert not list(target.parent.iterdir())
    download_weights(target, url=server + published.name, sha256=right)
    assert [p.name for p in target.parent.iterdir()] == ["w.safetensors"]
    assert "Mixed_7c.branch_pool.conv.weight" in load_file(target)
