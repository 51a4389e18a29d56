"""Settings: presets, overrides and what is refused."""

import pytest
from clvq.errors import ConfigError
from clvq.trainer.config import TrainConfig, preset_config, with_overrides
from pydantic import ValidationError


def _config() -> TrainConfig:
    return preset_config("default", lower="hidden.1", upper="hidden.2")


def test_the_paper_preset_holds_the_published_figures() -> None:
    config = preset_config("paper", lower="hidden.8", upper="hidden.12")
    assert config.quantizer.model_dump() == {
        "kind": "ema",
        "codes": 400,
        "decay": 0.99,
        "epsilon": 1e-5,
        "smoothed_counts": True,
        "commitment": 0.1,
        "top_k": 5,
        "temperature": 1.0,
        "revive_after": 0,
    }
    assert config.encoder.model_dump() == {"kind": "adaptive", "mix_start": 0.2}
    assert config.decoder.model_dump() == {"layers": 6, "heads": 8, "hidden": 2048, "dropout": 0.1}
    assert config.optimizer.model_dump() == {
        "name": "adam",
        "lr": 5e-3,
        "weight_decay": 1e-4,
        "schedule": "plateau",
        "plateau_factor": 0.5,
        "plateau_patience": 5,
    }
    assert (config.fit.epochs, config.fit.patience, config.fit.texts_per_batch) == (50, 15, 128)
    assert (config.fit.held_out_share, config.fit.precision) == (0.1, "float32")
    assert (config.start.space, config.start.spherical, config.start.iterations) == ("lower", True, 300)
    assert (config.special, config.seed) == ("leading", 42)


def test_the_default_preset_fixes_its_codes_once_the_encoder_is_trained() -> None:
    config = _config()
    assert config.quantizer.model_dump() == {"kind": "fixed", "codes": 400}
    assert (config.encoder.kind, config.start.space, config.start.spherical) == ("predictor", "encoded", False)
    assert config.optimizer.schedule == "linear"


def test_an_override_changes_one_setting_and_nothing_else() -> None:
    changed = with_overrides(_config(), {"fit.epochs": "3"})
    assert changed.fit.epochs == 3
    assert changed.model_copy(update={"fit": _config().fit}) == _config()


def test_overrides_are_json_where_they_parse_and_strings_otherwise() -> None:
    changed = with_overrides(_config(), {"split": '["a", "b"]', "held_out": "dev", "optimizer.lr": "1e-4"})
    assert changed.split == ("a", "b")
    assert changed.held_out == "dev"
    assert changed.optimizer.lr == 1e-4


def test_no_override_leaves_the_settings_as_they_are() -> None:
    assert with_overrides(_config(), {}) == _config()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fit.epoch", "3", "there is no setting 'fit.epoch': in 'fit' there are texts_per_batch, slots_per_batch"),
        ("epochs", "3", "there is no setting 'epochs': here there are lower, upper, split"),
        ("fit", "3", "'fit' is a group of settings: set one of fit.texts_per_batch"),
        ("seed.x", "3", "there is no setting 'seed.x'"),
        ("fit.epochs", "many", "fit.epochs cannot be 'many': Input should be a valid integer"),
        ("encoder.expansion", "0", "encoder.expansion cannot be 0: Input should be greater than or equal to 1"),
        ("quantizer.codes", "1", "quantizer.codes cannot be 1"),
        ("encoder.dropout", "1", "encoder.dropout cannot be 1: Input should be less than 1"),
        ("quantizer.top_k", "2", "there is no setting 'quantizer.top_k': in 'quantizer' there are kind, codes"),
        ("fit.precision", "float16", "fit.precision cannot be 'float16': Input should be 'float32' or 'bfloat16'"),
        ("optimizer.schedule", "cosine", "optimizer.schedule cannot be 'cosine'"),
        ("preset", "paper", "preset cannot be set by itself: choose another --method or --preset"),
    ],
)
def test_a_wrong_override_is_refused_by_name(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(_config(), {name: value})
    assert message in str(caught.value)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="clvq-vae has no preset 'best': use one of paper, default"):
        preset_config("best", lower="hidden.1", upper="hidden.2")


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize(("group", "kinds"), [("encoder", ("adaptive", "predictor")), ("quantizer", ("ema", "fixed"))])
def test_another_kind_of_part_is_refused(preset: str, group: str, kinds: tuple[str, str]) -> None:
    config = preset_config(preset, lower="hidden.1", upper="hidden.2")
    other = kinds[1] if getattr(config, group).kind == kinds[0] else kinds[0]
    with pytest.raises(ConfigError):
        with_overrides(config, {f"{group}.kind": other})


def test_settings_come_back_from_json_as_they_were() -> None:
    for preset in ("default", "paper"):
        config = preset_config(preset, lower="hidden.1", upper="hidden.2", held_out="dev")
        assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_a_preset_with_too_few_codes_is_refused() -> None:
    with pytest.raises(ConfigError, match="codes cannot be 1"):
        preset_config("paper", lower="hidden.1", upper="hidden.2", codes=1)


def test_settings_cannot_be_changed_in_place_or_misspelled() -> None:
    config = _config()
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({**config.model_dump(), "sede": 1})
