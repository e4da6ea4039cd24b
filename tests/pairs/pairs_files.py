"""Pairs: the job's own files: its configs, images, captions and weights."""

from __future__ import annotations

from pair_kit import ACCELERATE, Pair, Place


def _key_unknown(place: Place) -> None:
    place.train["learning_rte"] = 1e-4


def _value_wrong(place: Place) -> None:
    place.train["learning_rate"] = "fast"


def _size_odd(place: Place) -> None:
    place.data(img_size=100)


def _yaml_broken(place: Place) -> None:
    place.start = (*place.start[:-1], "broken.yaml")
    (place.folder / "broken.yaml").write_text("rank: 4\n\tlearning_rate: 1\n")
    place.check = ("--quick", "--config", "broken.yaml")


def _accelerate_key(place: Place) -> None:
    place.accelerate["num_procs"] = 2
    place.start = ACCELERATE


def _accelerate_value(place: Place) -> None:
    place.accelerate["mixed_precision"] = "float16"
    place.start = ACCELERATE


def _accelerate_type(place: Place) -> None:
    place.accelerate["distributed_type"] = "DDP"
    place.start = ACCELERATE


def _accelerate_broken(place: Place) -> None:
    (place.folder / "broken.yaml").write_text("num_processes: 1\n\tnum_machines: 1\n")
    place.start = tuple("broken.yaml" if word == "accelerate.yaml" else word for word in ACCELERATE)
    place.check = ("--quick", "--accelerate-config", "broken.yaml")


def _no_folder(place: Place) -> None:
    place.data(img_dir="/data/nowhere")


def _no_caption(place: Place) -> None:
    next(place.photos().glob("*.json")).unlink()


def _no_caption_key(place: Place) -> None:
    next(place.photos().glob("*.json")).write_text('{"text": "a cat"}')


def _broken_image(place: Place) -> None:
    photo = next(place.photos().glob("*.jpg"))
    photo.write_bytes(photo.read_bytes()[:-1000])


def _not_an_image(place: Place) -> None:
    next(place.photos().glob("*.jpg")).write_text("<html>404</html>")


def _no_model(place: Place) -> None:
    place.train["pretrained_model"] = str(place.folder / "flux")


def _part_missing(place: Place) -> None:
    for file in (place.own_model() / "vae").glob("*.safetensors"):
        file.unlink()


def _cut_short(place: Place) -> None:
    file = next((place.own_model() / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5000])


def _pointer(place: Place) -> None:
    file = next((place.own_model() / "text_encoder").glob("*.safetensors"))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 246144152\n")


def _cut_for_diffusers(place: Place) -> None:
    _cut_short(place)
    model = place.train["pretrained_model"]
    place.script(
        f"from diffusers import FluxTransformer2DModel as F\nF.from_pretrained({model!r}, subfolder='transformer')\n"
    )


def _no_tokenizer(place: Place) -> None:
    for file in (place.own_model() / "tokenizer_2").iterdir():
        file.unlink()


def _hub_offline(place: Place) -> None:
    place.train["pretrained_model"] = "black-forest-labs/FLUX.1-dev"


def _output_is_a_file(place: Place) -> None:
    (place.folder / "taken").write_text("")
    place.train["output_dir"] = str(place.folder / "taken" / "out")


def _cache_is_a_file(place: Place) -> None:
    (place.folder / "taken").write_text("")
    place.train["cache_dir"] = str(place.folder / "taken" / "cache")


PAIRS: tuple[Pair, ...] = (
    Pair("train-key-unknown", "config-missing-key", "LA102", _key_unknown, quick=True),
    Pair("train-value-wrong", "config-missing-key", "LA102", _value_wrong),
    Pair("train-size-odd", "config-missing-key", "LA102", _size_odd),
    Pair("train-yaml-broken", "config-missing-key", "LA102", _yaml_broken),
    Pair("accelerate-key-unknown", "accelerate-config-unknown-keys", "LA103", _accelerate_key, quick=True),
    Pair("accelerate-precision-unknown", "config-missing-key", "LA104", _accelerate_value),
    Pair("accelerate-type-unknown", "config-missing-key", "LA104", _accelerate_type),
    Pair("accelerate-yaml-broken", "config-missing-key", "LA101", _accelerate_broken),
    Pair("dataset-folder-absent", "dataset-file-missing", "DA101", _no_folder),
    Pair("caption-absent", "dataset-file-missing", "DA101", _no_caption, quick=True),
    Pair("caption-key-absent", "dataset-key-missing", "DA101", _no_caption_key),
    Pair("image-broken", "image-decode", "DA101", _broken_image, quick=True),
    Pair("image-is-html", "image-decode", "DA101", _not_an_image),
    Pair("model-absent", "model-file-missing", "WE101", _no_model),
    Pair("weights-absent", "model-file-missing", "WE101", _part_missing),
    Pair("weights-cut-short", "corrupt-checkpoint", "WE101", _cut_short, quick=True),
    Pair("weights-are-a-pointer", "corrupt-checkpoint", "WE101", _pointer),
    Pair("weights-cut-short-diffusers", "corrupt-checkpoint", "WE101", _cut_for_diffusers),
    Pair("tokenizer-absent", "model-file-missing", "WE101", _no_tokenizer),
    Pair("hub-offline", "hub-offline", "WE102", _hub_offline, quick=True),
    Pair("output-is-a-file", "output-not-writable", "DA102", _output_is_a_file, quick=True),
    Pair("cache-is-a-file", "output-not-writable", "ST106", _cache_is_a_file),
)
