"""The typed description of a run: frozen sections and the `Config` that holds them.

A recipe (`dinov3_train.recipes`) is a function that returns a `Config`; `key.sub=value` overrides are merged into the
typed structure, so an unknown key or a wrong type is an error that names the nearest keys. Only `build.py`,
`validation.py`, `planning.py`, the command line and recipes read `Config`; models, losses and data take the plain
section they own.

Numbers cite the paper (arXiv 2508.10104) or the defaults of the released weights where the two differ.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Axial rotary positions: coordinates in [-1, 1] per axis; in training shifted, then jittered, then rescaled."""

    base: float = 100.0  # periods base^(2k/(E/2)), k < E/4
    shift: float | None = None  # add U(-s, s) per axis
    jitter: float | None = None  # multiply each axis by exp U(-ln j, ln j)
    rescale: float | None = 2.0  # multiply both axes by one exp U(-ln r, ln r)
    draw: str = "sequence"  # "sequence": once per crop and step | "block": per block and crop group, as released models


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A vision transformer, every number of its architecture (paper section 3, spec table of sizes)."""

    name: str = "vit_large"
    embed_dim: int = 1024
    depth: int = 24
    heads: int = 16
    ffn: str = "mlp"  # "mlp" | "swiglu" (hidden rounded up to 8) | "swiglu64" (rounded up to 64)
    ffn_ratio: float = 4.0
    patch_size: int = 16
    registers: int = 4
    layer_scale: float = 1e-5  # initial value of the residual gains
    init_std: float = 0.02  # of the linears' truncated normal; small widths and short runs learn sooner with more
    norm_eps: float = 1e-5
    qkv_bias: bool = True
    mask_k_bias: bool = True
    untie_local_cls_norm: bool = False  # a LayerNorm of its own for CLS and registers of local crops while training
    drop_path: float = 0.0  # share of sequences whose residual branch is skipped
    rope: Rope = field(default_factory=Rope)


@dataclass(frozen=True, kw_only=True)
class ConvNeXtBackbone:
    """A ConvNeXt, every number of its architecture (spec 1.4). Stride in pixels: 4 for the stem, 2 more per stage."""

    name: str = "convnext_tiny"
    depths: tuple[int, ...] = (3, 3, 9, 3)  # blocks of each stage
    dims: tuple[int, ...] = (96, 192, 384, 768)  # width of each stage
    patch_size: int = 32  # pixels a patch feature stands for; another than the stride: the map is resized bilinearly
    layer_scale: float = 1e-6  # initial value of the residual gains
    init_std: float = 0.02  # of the truncated normal of convolutions and linears
    norm_eps: float = 1e-6
    drop_path: float = 0.0  # share of images whose residual branch is skipped

    @property
    def embed_dim(self) -> int:
        """Width D of the features."""
        return self.dims[-1]

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def stride(self) -> int:
        """Pixels between neighbours of the last map; image sides must be multiples of it."""
        return 4 * 2 ** (len(self.depths) - 1)


@dataclass(frozen=True, kw_only=True)
class Head:
    """Projection head: linears with GELU, L2 normalisation, then prototypes without bias."""

    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 65536
    layers: int = 3
    init_std: float = 0.02  # of the MLP's truncated normal
    prototype_std: float = 0.02  # of the prototypes' truncated normal; sharper first targets with more


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Multi-crop augmentation. Sides in pixels; scales are shares of the image's area."""

    globals: int = 2
    locals: int = 8
    global_size: int = 256
    local_size: int = 112
    gram_size: int | None = None  # side of the Gram teacher's crop (geometry of the global crop); None: no such crop
    # (global, local, Gram side (0: none), probability): one of them is drawn for each step; empty: always the sides
    # above. With a mix, `global_size` is the side the backbone is evaluated at
    mix: tuple[tuple[int, int, int, float], ...] = ()
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    horizontal_flip: float = 0.5
    # blur probabilities of global crop 1, global crop 2, local crops. "paper": 1.0, 0.1, 0.5 as the DINO paper means
    # them; "released": 0.0, 0.9, 0.5 as every released weight was trained (an inverted argument in the published code);
    # "none": no blur
    blur: str = "paper"
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    color_jitter_probability: float = 0.8
    grayscale: float = 0.2
    solarize: float = 0.2  # on the second global crop, threshold 128
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Masking:
    """BEiT block masks for iBOT: a share of all global crops, each with its own masked share of patches."""

    crop_probability: float = 0.5
    ratio_min: float = 0.1
    ratio_max: float = 0.5
    hide: bool = True  # the student sees a mask token there; False: it sees all, masks are the places of the iBOT term


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where images come from: folder, file list, tar shards, `torchvision:NAME` or manifest (.parquet), or several."""

    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # of each source's images in a step; empty: one pool in which all images are equal
    homogeneous: tuple[str, ...] = ()  # of the sources, those that fill whole steps of their own
    homogeneous_share: float = 0.0  # of all steps (paper: 0.1, ImageNet-1k); the others mix all sources by weight
    labelled: tuple[str, ...] = ()  # train and test source for the online k-NN: empty, or exactly two
    workers: int | None = None  # loader processes; None: one per core, at most 8. Any number gives the same images
    max_unreadable: float = 0.01  # share of images; above it the run stops with the list


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Weights and temperatures of DINO, iBOT and KoLeo (paper section 3.2, spec section 3)."""

    dino: float = 1.0
    ibot: float = 1.0
    koleo: float = 0.1
    koleo_patches: float = 0.0  # KoLeo among the patches of a crop; of the study dense-regularizers
    dense: float = 0.0  # a dense head, of the iBOT head's shape, at every patch; of the study dense-regularizers
    koleo_group: int | None = None  # images a nearest neighbour is looked for in; None: the rank's batch
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup: int = 0  # steps
    sinkhorn_iterations: int = 3
    local_weight: float = 1.0  # weight of the local DINO term beside its 16/18 (0.5 in the paper's later stages)
    local_weight_start: float | None = None  # cosine from here to `local_weight`; None: constant
    local_weight_ramp: int = 0  # steps of that cosine


@dataclass(frozen=True, kw_only=True)
class Gram:
    """Gram anchoring: the student's patch similarities are held to a Gram teacher's (paper section 4.2, spec 3.6).

    Its crops are the global crops' geometry at `crops.gram_size`, without colour distortion; where that is null it sees
    the global crops as the student does.
    """

    weight: float = 0.0  # of the mean squared difference of similarities; 0: no Gram term, no Gram teacher
    features: float = 0.0  # weight of 1 - cos to the Gram teacher's own patch features; of the study dense-regularizers
    ramp: int = 0  # steps of a cosine from 0 to `weight`
    teacher: str | None = None  # "ema": the live EMA teacher | RUN, one of its checkpoints or history files, FILE, ...
    clip: str = "none"  # negative similarities count as zero: "none" | "both" sides | the "teacher"'s only
    level: str = "image"  # similarities within an "image" | within the whole "batch"
    crops: int | None = None  # the first so many global crops enter; None: all
    refresh_every: int = 0  # steps between hard copies of the EMA teacher into the Gram teacher; 0: never
    refresh_start: int = 0  # no copy before this many steps
    refreshes: int | None = None  # at most so many copies; None: no limit


@dataclass(frozen=True, kw_only=True)
class Start:
    """Which run the weights come from; a stage has a folder and a step count of its own."""

    run: str | None = None  # RUN or one of its checkpoints: student, EMA teacher and both heads; null: fresh weights
    student: str = "student"  # what the student takes: the "student"'s own weights | those of the EMA "teacher"
    optimizer: bool = False  # take AdamW's moments too


@dataclass(frozen=True, kw_only=True)
class Init:
    """Weights that training starts from instead of random ones; a resumed run does not look at them again."""

    weights: str | None = None  # RUN, FILE.pth, FILE.safetensors, folder, hf:OWNER/NAME, timm:NAME; null: random
    # "recipe": the weights must be of the recipe's architecture | "weights": `backbone`, the heads where the weights
    # have some, `crops.mean` and `crops.std` follow the weights
    architecture: str = "recipe"
    heads: bool = True  # take the heads too where the weights have them; else they are fresh
    origin: str | None = None  # written when the weights are imported
    licence: str | None = None  # written when the weights are imported


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW with layer-wise decay; effective rate = lr * 4 * sqrt(batch / 1024) under `sqrt_wrt_1024`."""

    lr: float = 1e-3
    lr_rule: str = "sqrt_wrt_1024"  # | "linear_wrt_256" | "none"
    lr_end: float | None = None  # None: constant after warm-up
    warmup: int = 0  # steps from 0 to `lr`
    warmup_shape: str = "linear"  # | "cosine", as the paper's high-resolution adaptation
    cooldown: int = 0  # last steps, cosine to lr_end (None: to 0); 0: cosine over the whole run where lr_end is set
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.04
    weight_decay_end: float | None = None  # cosine over the run
    layer_decay: float = 1.0
    patch_embed_multiplier: float = 0.2
    clip: float | None = 3.0  # per module: backbone, DINO head, iBOT head
    freeze_prototypes: int = 0  # steps in which the last layer of the heads does not move
    backbone_rate: float = 1.0  # the backbone's learning rate as a share of the heads'
    # steps in which the heads learn alone; null: a twentieth of the run, at least `warmup`, where imported weights get
    # fresh heads, else none
    freeze_backbone: int | None = None
    backbone_ramp: int | None = None  # steps after that, backbone's rate linear from 0; null: as many as it was frozen
    momentum: float = 0.994  # of the EMA teacher
    momentum_end: float | None = None  # cosine over the run


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A frozen teacher and the students that follow it (spec 5.1); the run folder of each student holds all of it."""

    teacher: str = ""  # what `weights.resolve` takes; empty: no distillation
    students: tuple[str, ...] = ()  # names of architectures, such as vit_small or convnext_tiny
    overrides: tuple[str, ...] = ()  # "NAME.key.sub=value": for the students whose name begins with NAME
    teacher_size: int | None = None  # side of the global crops the teacher sees, pixels; None: the students'
    head_steps: int = 0  # steps of training heads for a teacher that comes without, its backbone frozen; 0: it has them
    groups: tuple[int, ...] = ()  # ranks of each student; empty: by cost, all on every rank where there are too few


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long, how large a batch, in which precision, what is kept."""

    steps: int = 100_000
    minutes: float | None = None  # stop (with a checkpoint) after so many minutes of wall-clock, whatever `steps` says
    batch_size: int = 64  # images over all ranks and micro-batches
    accumulate: int = 1  # micro-batches; Sinkhorn and KoLeo see one micro-batch
    seed: int = 0
    precision: str = "bf16"  # "bf16": autocast with fp32 weights | "fp32"
    compile: bool = False
    checkpointing: str = "none"  # activation checkpointing: "none" | "selective" | "full"
    checkpoint_every: int = 1000  # steps
    keep: int = 3  # newest checkpoints
    history_every: int = 0  # steps between teacher weights kept for choosing a Gram teacher; 0: none kept
    log_every: int = 10  # steps
    evaluate_every: int = 0  # steps between online k-NN on `data.labelled`; 0: never
    drift_every: int = 0  # steps between measures of how far the features are from those of `init.weights`; 0: never
    drift_images: int = 32  # training images they are measured on, the same all along
    max_skipped: int = 10  # non-finite steps in a row after which the run stops
    tensorboard: bool = True
    wandb: str | None = None  # project name; needs the extra


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Dense-feature health while training, without labels, on a fixed panel of images; see `dinov3 health`."""

    every: int = 200  # steps between looks at the EMA teacher, beside those at the start and the end; 0: none at all
    images: int = 16  # in the panel, spread evenly over its source
    source: str | None = None  # where they come from; None: the run's own images


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    recipe: str = ""
    backbone: Backbone | ConvNeXtBackbone = field(default_factory=Backbone)
    dino_head: Head = field(default_factory=Head)
    ibot_head: Head = field(default_factory=Head)
    crops: Crops = field(default_factory=Crops)
    masking: Masking = field(default_factory=Masking)
    data: Data = field(default_factory=Data)
    losses: Losses = field(default_factory=Losses)
    gram: Gram = field(default_factory=Gram)
    start: Start = field(default_factory=Start)
    init: Init = field(default_factory=Init)
    optimizer: Optimizer = field(default_factory=Optimizer)
    distillation: Distillation = field(default_factory=Distillation)
    run: Run = field(default_factory=Run)
    monitor: Monitor = field(default_factory=Monitor)


SECTIONS = (
    Config,
    Backbone,
    ConvNeXtBackbone,
    Rope,
    Head,
    Crops,
    Masking,
    Data,
    Losses,
    Gram,
    Start,
    Init,
    Optimizer,
    Distillation,
    Run,
    Monitor,
)


def leaves(config_type: type = Config, prefix: str = "") -> dict[str, type]:
    """Every settable key, dotted, with its annotated type."""
    hints = typing.get_type_hints(config_type)
    found: dict[str, type] = {}
    for entry in dataclasses.fields(config_type):
        key = f"{prefix}{entry.name}"
        for section in sections_of(hints[entry.name]):
            found |= leaves(section, key + ".")
        if not sections_of(hints[entry.name]):
            found[key] = hints[entry.name]
    return found


def sections_of(hint: object) -> tuple[type, ...]:
    """The section classes a field of this annotation may hold: none, one, or the several kinds of a union."""
    return tuple(kind for kind in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(kind))


def override(config: Config, overrides: Sequence[str], patch: str | Path | None = None) -> Config:
    """Merge a YAML patch, then `key.sub=value` pairs, into the typed structure.

    Args:
        config: what the recipe returned.
        overrides: `"optimizer.lr=1e-3"`, `"data.sources=[a,b]"`, ... values are read as YAML.
        patch: YAML file with the same nesting, merged before the overrides.

    Errors: ValueError for a word without `=`, an unknown key (naming the nearest ones) or a value of a wrong type.
    """
    known, updates = leaves(), {}
    if patch is not None:
        path = Path(patch)
        if not path.is_file():
            raise ValueError(f"config: expected a YAML file, got {patch!r}, which does not exist")
        updates |= _flatten(_parsed(path.read_text(), f"config file {path}"))
    for word in overrides:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise ValueError(f"override: expected key.sub=value, got {word!r}")
        updates[key.strip()] = _value(text, known.get(key.strip()))
    return replaced(config, updates)


def replaced(config: Config, updates: dict[str, object]) -> Config:
    """The config with dotted keys replaced, each checked against the type it is declared with."""
    known = leaves()
    values = to_dict(config)
    for key, value in updates.items():
        if key not in known:
            raise ValueError(_unknown(key, known))
        section = values
        *path, last = key.split(".")
        for part in path:
            section = section[part]
        section[last] = _coerced(key, value, known[key])
    return from_dict(values)


def to_dict(config: Config) -> dict:
    """Plain nested dictionaries and lists, as written into the run folder and each checkpoint."""
    return dataclasses.asdict(config)


def from_dict(values: dict, section: type = Config, prefix: str = "") -> Config:
    """The inverse of `to_dict`; an unknown key or a wrong type is a ValueError, a missing key takes its default."""
    hints = typing.get_type_hints(section)
    unknown = [f"{prefix}{key}" for key in values if key not in hints]
    if unknown:
        raise ValueError(_unknown(unknown[0], leaves()))
    arguments = {}
    for key, value in values.items():
        if sections_of(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"config: {prefix}{key} is a section, expected keys below it, got {value!r}")
            arguments[key] = from_dict(
                value, _kind(value, sections_of(hints[key]), f"{prefix}{key}."), f"{prefix}{key}."
            )
        else:
            arguments[key] = _coerced(f"{prefix}{key}", value, hints[key])
    return section(**arguments)


def _kind(values: dict, kinds: tuple[type, ...], prefix: str) -> type:
    """Which of several section classes has all the keys; a ViT is told from a ConvNeXt by what it alone has."""
    fields = {kind: {entry.name for entry in dataclasses.fields(kind)} for kind in kinds}
    fitting = [kind for kind in kinds if values.keys() <= fields[kind]]
    if fitting or len(kinds) == 1:
        return (fitting or kinds)[0]
    closest = max(kinds, key=lambda kind: len(values.keys() & fields[kind]))
    foreign = sorted(f"{prefix}{key}" for key in values.keys() - fields[closest])
    if not set(foreign) <= leaves().keys():
        return closest  # which will name the unknown key
    raise ValueError(f"config: {', '.join(foreign)} is no key of a {closest.__name__}, which this config has")


def to_yaml(config: Config) -> str:
    """YAML text of the whole effective config."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(to_dict(config))))


def from_yaml(text: str) -> Config:
    """The inverse of `to_yaml`."""
    return from_dict(_parsed(text, "config"))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _parsed(text: str, what: str) -> dict:
    try:
        parsed = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # the YAML library raises several unrelated types
        raise ValueError(f"{what}: expected YAML keys and values, got {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{what}: expected YAML keys and values, got {type(parsed).__name__}")
    return parsed


def _value(text: str, wanted: object) -> object:
    """A word of the command line as YAML; where text is wanted, a bare word stays as typed (`007`, `yes`, `*.jpg`)."""
    bare = text[:1] not in ("[", "'", '"') and text != "null"
    if bare and str in (wanted, *typing.get_args(wanted)):
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (OmegaConfBaseException, YAMLError):
        return text


def _flatten(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _unknown(key: str, known: dict[str, type]) -> str:
    by_tail = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    close = list(dict.fromkeys(by_tail + difflib.get_close_matches(key, known, n=3, cutoff=0.5)))[:3]
    below = [name for name in known if name.startswith(key + ".")][:3]
    hint = f"; nearest: {', '.join(below or close)}" if close or below else ""
    return f"config: unknown key {key!r}{hint}"


def _coerced(key: str, value: object, wanted: type) -> object:
    union = typing.get_origin(wanted) is not tuple and typing.get_args(wanted)
    options = union or (wanted,)
    for option in options:
        accepted, result = _accept(value, option)
        if accepted:
            return result
    name = " | ".join(getattr(o, "__name__", str(o)) if typing.get_origin(o) is None else str(o) for o in options)
    raise ValueError(f"config: {key} expects {name.replace('NoneType', 'null')}, got {value!r}")


def _accept(value: object, option: type) -> tuple[bool, object]:
    """Whether `value` is of type `option` (an int counts as a float, a word as a tuple of one), and its final form."""
    if option is type(None):
        return value is None, None
    if typing.get_origin(option) is tuple:
        entries = value if isinstance(value, (tuple, list)) else (value,) if isinstance(value, str) and value else None
        if entries is None:
            return False, None
        kinds = typing.get_args(option)
        kinds = (kinds[0],) * len(entries) if kinds[-1] is Ellipsis else kinds
        parts = [_accept(entry, kind) for entry, kind in zip(entries, kinds)]
        return len(entries) == len(kinds) and all(ok for ok, _ in parts), tuple(part for _, part in parts)
    if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return True, float(value)
    if option is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return True, str(value)
    return isinstance(value, option) and (option is bool or not isinstance(value, bool)), value
