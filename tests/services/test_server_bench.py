"""What the page asks for besides: vectors that the server offers, sessions as files, and where points are."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.served import MESSAGES, Served, demo, serving

import hookmap
from hookmap.analysis.steering import About, SteeringVector


@pytest.fixture(scope="module")
def directions() -> dict[int, torch.Tensor]:
    return {layer: torch.randn(64, generator=torch.Generator().manual_seed(layer)) for layer in (3, 8)}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, directions: dict[int, torch.Tensor]) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vectors")
    about = About(point="resid_post", method="mean_difference", pairs=1, positions="last")
    SteeringVector(about, directions).save(folder / "glad one.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no vector")
    (folder.parent / "secret.safetensors").write_bytes((folder / "glad one.safetensors").read_bytes())
    with serving(tmp_path_factory.mktemp("sessions"), vectors=folder) as found:
        yield found


@pytest.mark.slow
def test_vectors_of_the_folder_are_offered_as_numbers(served: Served, directions: dict[int, torch.Tensor]) -> None:
    (told,) = served.get("/v1/vectors").json()["data"]
    assert (told["name"], told["point"], told["layers"], told["width"]) == ("glad one", "resid_post", [3, 8], 64)
    for layer, direction in directions.items():
        one = served.get(f"/v1/vectors/glad%20one?layer={layer}").json()
        assert torch.equal(torch.tensor(one["vector"]), direction)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("glad%20one?layer=4", 400),
        ("broken?layer=3", 400),
        ("none?layer=3", 404),
        ("..%2Fsecret?layer=3", 404),
        ("%2Fetc%2Fpasswd?layer=3", 404),
    ],
)
def test_what_is_not_offered_is_refused_without_a_path(served: Served, path: str, status: int) -> None:
    answer = served.get(f"/v1/vectors/{path}")
    assert answer.status_code == status
    assert str(served.root.parent) not in answer.text


def test_a_server_without_a_folder_offers_none(tmp_path: Path) -> None:
    with serving(tmp_path) as other:
        assert other.get("/v1/vectors").json() == {"object": "list", "data": []}


def test_a_session_is_downloaded_whole(served: Served, tmp_path: Path) -> None:
    answer = served.chat(max_tokens=3, hookmap={"points": ["resid_mid", "z"], "layers": [2]}).json()
    file = served.get(f"/v1/activations/sessions/{answer['session_id']}/archive")
    assert file.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(file.content)) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    store = hookmap.open_store(tmp_path / answer["session_id"])
    run = served.hm.capture([MESSAGES], ["resid_mid", "z"], [2], max_new_tokens=3)
    for point in ("resid_mid", "z"):
        assert torch.equal(store.read(0, point, 2), run.read(0, point, 2))
    assert served.get("/v1/activations/sessions/act-none/archive").status_code == 404


def test_the_structure_says_where_points_are_and_cuts_no_line(served: Served) -> None:
    found = served.get("/v1/model/structure").json()
    assert found["places"]["z"] == {"layers": list(range(20)), "heads": demo().model.config.num_attention_heads}
    assert found["places"]["k"]["heads"] == demo().model.config.num_key_value_heads
    assert found["places"]["resid_post"]["heads"] is None and "logits" not in found["places"]
    assert "…" not in found["tree"]
