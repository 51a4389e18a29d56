"""Settings: presets, overrides and what is refused."""

import pytest
from clvq.errors import ConfigError
from clvq.trainer.config import TrainConfig, preset_config, with_overrides
from pydantic import ValidationError


def _config() -> TrainConfig:
    return preset_config("default", lower="hidden.1", upper="hidden.2")


def test_the_paper_preset_holds_the_published_figures() -> None:
    config = preset_config("paper", lower="hidden.8", upper="hidden.12")
    assert (config.quantizer.codes, config.quantizer.decay, config.quantizer.commitment) == (400, 0.99, 0.1)
    assert (config.quantizer.top_k, config.quantizer.temperature) == (5, 1.0)
    assert not config.quantizer.relative_temperature
    assert (config.decoder.layers, config.decoder.heads, config.decoder.hidden, config.decoder.dropout) == (
        6,
        8,
        2048,
        0.1,
    )
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("adam", 5e-3, 1e-4)
    assert (config.optimizer.plateau_factor, config.optimizer.plateau_patience) == (0.5, 5)
    assert (config.fit.epochs, config.fit.patience, config.fit.texts_per_batch) == (50, 15, 128)
    assert (config.start.space, config.start.spherical, config.start.restarts) == ("lower", True, 5)
    assert config.special == "leading"


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
        ("fit.epoch", "3", "there is no setting 'fit.epoch': in 'fit' there are epochs, warmup_epochs, patience"),
        ("epochs", "3", "there is no setting 'epochs': here there are method, preset, lower"),
        ("fit", "3", "'fit' is a group of settings: set one of fit.epochs"),
        ("seed.x", "3", "there is no setting 'seed.x'"),
        ("fit.epochs", "many", "fit.epochs cannot be 'many': Input should be a valid integer"),
        ("encoder.expansion", "0", "encoder.expansion cannot be 0: Input should be greater than or equal to 1"),
        ("quantizer.codes", "1", "quantizer.codes cannot be 1"),
        ("preset", "paper", "preset cannot be set by itself: choose another --preset"),
    ],
)
def test_a_wrong_override_is_refused_by_name(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(_config(), {name: value})
    assert message in str(caught.value)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="there is no preset 'best': use one of paper, default"):
        preset_config("best", lower="hidden.1", upper="hidden.2")


def test_a_preset_with_too_few_codes_is_refused() -> None:
    with pytest.raises(ConfigError, match="codes cannot be 1"):
        preset_config("paper", lower="hidden.1", upper="hidden.2", codes=1)


def test_settings_cannot_be_changed_in_place_or_misspelled() -> None:
    config = _config()
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({**config.model_dump(), "sede": 1})
