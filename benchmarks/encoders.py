"""Every encoder-decoder and masked language model: `python benchmarks/encoders.py [CLASSES] [--jobs N] [--table FILE]`.

A narrow copy of each class of transformers, of a few layers, is mapped and the map is verified; then a capture runs on
it: a generation of an encoder-decoder, a harvest of an encoder. The table says of each class what came out.

With `--ledger FILE` each class that is done has a line in it, and a run goes on with it.
"""

import json
import logging
import multiprocessing
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import torch

SECONDS = 300
MEMORY = 11 * 2**30
DEPTH = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
         "num_encoder_layers", "n_layers", "n_layer", "text_encoder_layers", "speech_encoder_layers")  # fmt: skip
LAYERS = 3
COMPLETIONS: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "xmod": {"default_language": "en_XX"},
}
"""settings without which a default config builds nothing that runs"""
NOT_NARROWED = ("mobilebert",)
"""whose sizes belong together in a way that a narrow copy breaks; of a few layers it is small"""
HEAD = """\
# Encoder-decoders and masked language models of transformers

Made by `python benchmarks/encoders.py --table docs/encoders-table.md` with transformers {version}; do not edit it.

{counts}.

*Proved*: of a narrow copy of a few layers, every point in the map that discovery finds is verified
([how](discovery.md)), and a capture runs on it: a generation of an encoder-decoder, whose rows are the decoder's
tokens, and a harvest of an encoder. *Refused*: hookmap says why it makes no map, or no capture. *Error*: the class
cannot be built, or does not run on the inputs that hookmap makes for it. *Wrong*: verification refutes the map, or
the capture fails.

| class | reads | status | blocks | not there, and why |
| --- | --- | --- | --- | --- |
"""


def classes() -> dict[str, tuple[str, str]]:
    """Class -> its model type, and what it is."""
    import transformers as tf
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, tuple[str, str]] = {}
    for kind, names in (
        ("encoder-decoder", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("encoder-decoder", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
        ("encoder-decoder", {"florence2": "Florence2ForConditionalGeneration", "udop": "UdopForConditionalGeneration"}),
        ("encoder-decoder", {"pix2struct": "Pix2StructForConditionalGeneration"}),
        ("encoder-decoder", {"vision-encoder-decoder": "VisionEncoderDecoderModel"}),
        ("encoder", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ):
        for model_type, name in names.items():
            if kind == "encoder" or "decoder_input_ids" in signature(getattr(tf, name).forward).parameters:
                found.setdefault(name, (model_type, kind))
    return found


def main(given: list[str]) -> None:
    named = {name: given.pop(given.index(name) + 1) for name in ("--jobs", "--ledger", "--table") if name in given}
    ledger = Path(named["--ledger"]) if "--ledger" in named else None
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger is not None and ledger.exists() else []
    found = {each["class"]: each for each in map(json.loads, lines)}
    wanted = [name for name in [each for each in given if each[0] != "-"] or sorted(classes()) if name not in found]
    with multiprocessing.get_context("spawn").Pool(int(named.get("--jobs", 1)), maxtasksperchild=8) as pool:
        for each in pool.imap_unordered(entry, wanted):
            print(each["class"], each["status"], each["detail"][:300], file=sys.stderr, flush=True)
            found[each["class"]] = each
            if ledger is not None:
                with ledger.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(each) + "\n")
    page = table([found[name] for name in sorted(found)])
    if "--table" in named:
        Path(named["--table"]).write_text(page, encoding="utf-8")
    else:
        print(page)


def entry(name: str) -> dict[str, Any]:
    """One class, in a process of the pool."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    said: dict[str, Any] = {"class": name, "reads": classes()[name][1], "status": "Error", "blocks": "", "missing": {}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {**said, **_tried(name), "status": "Proved"}
    except Exception as error:  # a model's own code raises what it likes
        said["detail"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        return {**said, "status": _status(error)}
    finally:
        signal.alarm(0)


class Wrong(Exception):
    """A map that verification refutes, or a capture that fails."""


def _status(error: Exception) -> str:
    from hookmap.errors import DiscoveryError, ModelError

    if isinstance(error, Wrong):
        return "Wrong"
    ours = isinstance(error, DiscoveryError) and error.__cause__ is None
    return "Refused" if ours or (isinstance(error, ModelError) and "transformers cannot" not in str(error)) else "Error"


def _tried(name: str) -> dict[str, Any]:
    import hookmap
    from hookmap.errors import ModelError
    from hookmap.loading.configs import build
    from hookmap.loading.narrow import narrow
    from hookmap.verification.verify import redraw, verify

    config = config_of(name)
    config = config if config.model_type in NOT_NARROWED else narrow(config)
    model = build(config, "cpu", torch.float32)
    if type(model).__name__ != name:
        raise Wrong(f"{type(model).__name__} was built")
    redraw(model)
    found = hookmap.discover(model)
    result = verify(model, architecture_map=found)
    if failed := [check.detail for check in result.checks if not check.passed]:
        raise Wrong("; ".join(failed))
    try:
        detail = _captured(model)
    except ModelError as error:
        raise ModelError(f"the map is proved; a capture is refused: {error}") from error
    except hookmap.HookmapError as error:
        raise Wrong(str(error)) from error
    missing = {point: why for kind in found.kinds for point, why in kind.unavailable.items()}
    kinds = [f"{kind.name} ({len(kind.layers)}): {kind.branch_order}, {kind.norm_placement}" for kind in found.kinds]
    cross = "cross-attention" if any(kind.cross_attn is not None for kind in found.kinds) else ""
    blocks = "<br>".join([f"`{found.layers_path}`", *kinds, *filter(None, [cross])])
    return {"blocks": blocks, "missing": {**found.model_unavailable, **missing}, "detail": detail}


def _captured(model: Any) -> str:
    """A short capture; what it is of."""
    import hookmap
    from hookmap.loading.encoder_decoder import is_encoder_decoder
    from hookmap.loading.encoder_prompts import trial_prompt

    hm = hookmap.open(model)
    point = next(name for name in ("resid_post", "resid_pre") if name in hm.map.points)
    if not is_encoder_decoder(model):
        run = hm.capture([[5, 6, 7, 8], [9, 10, 11]], point, max_new_tokens=0)
        assert [sample.rows for sample in run.samples] == [4, 3]
        return ""
    own = hm.root.generation_config
    own.num_beams, own.decoder_start_token_id, own.bos_token_id = 1, 2, 2
    run = hm.capture([trial_prompt(model, [2])], point, max_new_tokens=3, min_new_tokens=3)
    assert [sample.rows for sample in run.samples] == [3]
    return ""


def config_of(name: str) -> Any:
    """The default config of a class, of a few layers."""
    import transformers as tf

    model_type, _ = classes()[name]
    if model_type.endswith("encoder-decoder"):
        encoder = {"speech": tf.Wav2Vec2Config, "vision": tf.ViTConfig}.get(model_type.split("-")[0], tf.BertConfig)
        decoder = tf.BertConfig(is_decoder=True, add_cross_attention=True)
        made = {"speech": tf.SpeechEncoderDecoderConfig, "vision": tf.VisionEncoderDecoderConfig}
        kind = made.get(model_type.split("-")[0], tf.EncoderDecoderConfig)
        config = kind.from_encoder_decoder_configs(encoder(), decoder)
        config.decoder_start_token_id, config.pad_token_id = 2, 0
    else:
        config = tf.CONFIG_MAPPING[model_type](**COMPLETIONS.get(model_type, {}))
    config.architectures = [name]
    if model_type != "neomme":  # its layers have settings of their own
        _shallow(config)
    return config


def _shallow(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _shallow(value)
        elif name in DEPTH and isinstance(value, int) and value > LAYERS:
            setattr(config, name, LAYERS)
            for other, each in vars(config).items():  # such as layer_types
                if isinstance(each, list) and len(each) == value:
                    setattr(config, other, each[:LAYERS])


def _stop(*_: Any) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


def table(found: list[dict[str, Any]]) -> str:
    from importlib.metadata import version

    counts = Counter((each["reads"], each["status"].lower()) for each in found)
    told = "; ".join(
        f"of {sum(n for (kind, _), n in counts.items() if kind == of)} {of}s "
        + ", ".join(f"{n} {status}" for (kind, status), n in sorted(counts.items()) if kind == of)
        for of in ("encoder-decoder", "encoder")
    )
    rows = [
        f"| {each['class']} | {each['reads']} | {each['status']} | {each['blocks']} | {'<br>'.join(_why(each))} |"
        for each in sorted(found, key=lambda each: (each["reads"], each["class"]))
    ]
    return HEAD.format(version=version("transformers"), counts=told[:1].upper() + told[1:]) + "\n".join(rows) + "\n"


def _why(each: dict[str, Any]) -> Iterator[str]:
    if each["detail"]:
        yield each["detail"].replace("|", "\\|")[:300]
    reasons: dict[str, list[str]] = {}
    for point, why in each["missing"].items():
        if point in ("logits", "final_norm", "resid_mid", "mixer_in", "mixer_out", "mlp_in", "mlp_out", "embed"):
            reasons.setdefault(why, []).append(f"`{point}`")
    yield from (f"{', '.join(points)}: {why}".replace("|", "\\|") for why, points in reasons.items())


if __name__ == "__main__":
    main(sys.argv[1:])
