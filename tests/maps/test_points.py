"""The parts of a point's name, and the names of the same branch's other points."""

from hookmap.maps.points import POINTS, PointName


def test_a_name_is_taken_apart_and_put_together() -> None:
    assert PointName.of("mlp_out") == PointName("mlp_out")
    assert PointName.of("mlp_out.1") == PointName("mlp_out", "1")
    assert str(PointName.of("mlp_out.1")) == "mlp_out.1"
    assert PointName.of("mlp_out.1").definition is POINTS["mlp_out"]


def test_other_points_of_the_same_branch() -> None:
    assert PointName.of("mlp_in.1").end("out_raw") == "mlp_out_raw.1"
    assert PointName.of("attn_out_raw").end("out") == "attn_out"
    assert PointName.of("q.2").numbered("mixer_in") == "mixer_in.2"


def test_attention_and_mixer_name_the_same_tensor() -> None:
    assert PointName.of("attn_out.1").as_mixer() == "mixer_out.1"
    assert PointName.of("mixer_out.1").as_attention() == "attn_out.1"
    assert PointName.of("mlp_out.1").as_mixer() == PointName.of("mlp_out.1").as_attention() == "mlp_out.1"
