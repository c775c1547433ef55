"""The configuration of a run: pydantic models, every field described, unknown keys refused.

A configuration is a JSON object; what is not given takes the default below. `compress.config_file` reads files, applies
`--set` overrides and turns every fault into one sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Base of all sections: unknown keys and silent type changes are refused, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which images, how they are split, normalised and augmented."""

    name: str = Field("digits", description="data set: digits (embedded in scikit-learn, needs no files), cifar10, cifar100, mnist, fashion_mnist, tiny_imagenet, image_folder")
    root: Path | None = Field(None, description="folder that holds the data set; COMPRESS_DATA is used where this is null")
    download: bool = Field(False, description="let torchvision download the data set into root")
    batch_size: int = Field(128, ge=1, description="images per training step, over all processes together")
    eval_batch_size: int = Field(512, ge=1, description="images per evaluation step")
    val_fraction: float = Field(0.1, ge=0, lt=1, description="share of the training set held out for choosing epochs and settings")
    train_images: int | None = Field(None, ge=2, description="use only so many training images (after the split); null: all")
    crop_padding: int | None = Field(None, ge=0, description="random crop after padding by so many pixels; null: the data set's own")
    flip: bool | None = Field(None, description="random horizontal flip; null: the data set's own (off for digits)")
    mean: list[float] | None = Field(None, description="per-channel mean in [0, 1] units; null: the data set's own")
    std: list[float] | None = Field(None, description="per-channel standard deviation in [0, 1] units; null: the data set's own")
    image_size: int | None = Field(None, ge=4, description="side in pixels that image folders and Tiny-ImageNet are resized to; null: 224 or 64")
    workers: int = Field(2, ge=0, description="DataLoader processes for image folders; small sets live on the device and need none")

    @field_validator("std")
    @classmethod
    def _positive(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and min(value, default=1.0) <= 0:
            raise ValueError("every standard deviation must be above 0")
        return value


class ModelConfig(Section):
    """Which network, and the trained weights it starts from."""

    name: str | None = Field("resnet20", description="name in the model registry, or `torchvision/<name>`")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the model builder (width, shortcut, ...)")
    weights: Path | None = Field(None, description="safetensors file of trained weights; relative names are also looked up in COMPRESS_WEIGHTS; null: train first")
    import_: str | None = Field(None, alias="import", description="the user's own network as `package.module:function`; called with num_classes and options")

    @field_validator("import_")
    @classmethod
    def _has_colon(cls, value: str | None) -> str | None:
        if value is not None and (value.count(":") != 1 or not all(value.split(":"))):
            raise ValueError("expected `package.module:function`")
        return value


class DistillConfig(Section):
    """Knowledge distillation from the unpruned network (Hinton et al. 2015)."""

    temperature: float = Field(4.0, gt=0, description="softmax temperature T; the term is scaled by T^2")
    weight: float = Field(0.5, ge=0, le=1, description="weight of the distillation term; the label term has 1 - weight")


class TrainConfig(Section):
    """How a network is trained."""

    epochs: int = Field(20, ge=0, description="passes over the training set")
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = Field("sgd", description="optimiser")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD and RMSprop, or Adam's beta1")
    nesterov: bool = Field(True, description="Nesterov momentum (SGD only, ignored at momentum 0)")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty (SGD, Adam, RMSprop) or decoupled decay (AdamW)")
    decay_norm_and_bias: bool = Field(True, description="apply weight decay to normalisation parameters and biases too")
    schedule: Literal["constant", "multistep", "cosine", "onecycle"] = Field("cosine", description="learning-rate schedule, per step")
    milestones: list[float] = Field([0.5, 0.75], description="multistep: fractions of the training at which the rate drops")
    gamma: float = Field(0.1, gt=0, le=1, description="multistep: factor at each milestone")
    warmup_epochs: float = Field(0.0, ge=0, description="linear warm-up length (constant, multistep, cosine)")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing of the cross-entropy")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the weight average that is evaluated and kept; null: none")
    amp: Literal["off", "bf16"] = Field("off", description="autocast data type")
    channels_last: bool = Field(False, description="NHWC memory format")
    compile: bool = Field(False, description="torch.compile the training step")
    grad_clip: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")
    select: Literal["last", "val"] = Field("last", description="keep the last epoch, or the one with the best validation accuracy")

    @field_validator("milestones")
    @classmethod
    def _fractions(cls, value: list[float]) -> list[float]:
        if any(not 0 < x < 1 for x in value) or sorted(value) != value:
            raise ValueError("milestones must be increasing fractions in (0, 1)")
        return value


class FinetuneConfig(TrainConfig):
    """Training after compression; the defaults use a tenth of the base learning rate."""

    epochs: int = Field(10, ge=0, description="passes over the training set")
    lr: float = Field(0.02, gt=0, description="peak learning rate")
    batch_size: int | None = Field(None, ge=1, description="images per step over all processes; null: data.batch_size")
    distill: DistillConfig | None = Field(None, description="distillation from the unpruned network; null: none")


class PruneConfig(Section):
    """What is compressed, by which methods, to which budgets."""

    methods: list[str] = Field(["l1"], min_length=1, description="compression methods, each is run at each ratio")
    method_options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="options of single methods, by method name")
    budget: Literal["params", "macs", "latency", "weights"] = Field("macs", description="quantity that the ratio is taken of; latency: the time of a forward pass of latency_batch_size images, measured on the run's device")
    latency_batch_size: int = Field(1, ge=1, description="images per forward pass that a budget of latency is measured with")
    ratios: list[float] = Field([0.5], min_length=1, description="fractions REMOVED of the budgeted quantity, each in [0, 1)")
    allocation: Literal["uniform", "global", "measured"] = Field(
        "global", description="how the budget is shared: the same fraction of every group, one threshold, or by the loss measured layer by layer")
    max_layer_ratio: float = Field(0.95, gt=0, lt=1, description="largest fraction of a group's channels that may be removed (channel methods; the EigenDamage kinds have the option cap, the other low-rank methods and masks no limit)")
    round_to: int = Field(1, ge=1, description="kept widths (channel methods) and ranks (low rank) are multiples of this where the width allows, and the budget is then met from below; the EigenDamage kinds and masks take 1 only")
    exclude: list[str] = Field(default_factory=list, description="name patterns (fnmatch) of layers whose parameters stay as they are, the channels that they read included")
    calibration_images: int = Field(1024, ge=1, description="training images used for statistics")
    calibration_batch_size: int = Field(128, ge=1, description="images per statistics step")
    reconstruction_images: int = Field(0, ge=0, description="calibration images on which each layer of the compressed network is fitted to the original's outputs before BatchNorm is recalibrated; 0: none; not for masks")
    recalibration_images: int = Field(1024, ge=0, description="training images, augmented as in training, that BatchNorm statistics are measured on after surgery; 0: none")
    rounds: int = Field(1, ge=1, description="compress and fine-tune in so many rounds; finetune.epochs are those of one round")
    schedule: Literal["linear", "geometric", "cubic", "cosine", "one_cycle"] = Field("geometric", description="how the ratio is approached over several rounds")
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([0], min_length=1, description="each method and ratio is run once per seed")
    verify: bool = Field(True, description="check after surgery that the cut network equals the masked original")

    @field_validator("ratios")
    @classmethod
    def _ratios(cls, value: list[float]) -> list[float]:
        for ratio in value:
            if not 0 <= ratio < 1:
                raise ValueError(f"a ratio is the fraction removed, in [0, 1), got {ratio:g}" + (f"; write {ratio / 100:g} for {ratio:g} percent" if 2 <= ratio < 100 else ""))
        return value

    @model_validator(mode="after")
    def _distinct(self) -> PruneConfig:
        for field in ("methods", "ratios", "seeds"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field} holds the same value twice")
        return self


class BenchmarkConfig(Section):
    """How latency and memory are measured."""

    enabled: bool = Field(True, description="measure latency; parameters and MACs are always counted")
    batch_size: int = Field(64, ge=1, description="the second batch size, beside 1")
    seconds: float = Field(0.3, gt=0, description="shortest measuring time per network and batch size")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads while measuring; null: as torch is set")


class Config(Section):
    """A complete run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run folder below the output directory")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of initial weights, data order and base training")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU where there is one")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of torch; null: torch's own choice")
    deterministic: bool = Field(True, description="use deterministic operators; torch warns where it has none")
    data: DataConfig = Field(default_factory=DataConfig, description="data set")
    model: ModelConfig = Field(default_factory=ModelConfig, description="network")
    train: TrainConfig = Field(default_factory=TrainConfig, description="training of the unpruned network; not used where model.weights is given")
    prune: PruneConfig = Field(default_factory=PruneConfig, description="compression")
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig, description="training after compression")
    benchmark: BenchmarkConfig = Field(default_factory=BenchmarkConfig, description="latency")
