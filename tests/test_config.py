"""Configs: what is read, what is refused, and how that is said."""

import dataclasses
from pathlib import Path

import pytest

from blipfast.config import Config, ConfigError, config_from_dict, load_config, save_config, to_dict
from blipfast.files import whole


@pytest.fixture
def write(tmp_path):
    def write(text, name="my.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(path, overrides=()):
    with pytest.raises(ConfigError) as error:
        load_config(path, list(overrides))
    return str(error.value)


def test_settings_replace_defaults_and_the_rest_keeps_them(write):
    config = load_config(write('train: {batch_size: 8}\ndata: {train: [a.json, "shards/x-{0..3}.tar"]}\n'))
    assert config.train.batch_size == 8
    assert config.data.train == ["a.json", "shards/x-{0..3}.tar"]
    assert config.train.lr == 3e-4
    assert config.model == Config().model


@pytest.mark.parametrize(
    "text, value", [("3e-4", 3e-4), ("1E-5", 1e-5), ("2.5e3", 2500.0), (".5e-1", 0.05), ("1", 1.0)]
)
def test_numbers_need_neither_dot_nor_signed_exponent(write, text, value):
    lr = load_config(write(f"train: {{lr: {text}, min_lr: 0}}")).train.lr
    assert lr == value
    assert type(lr) is float


def test_a_path_that_looks_like_a_number_stays_text(write):
    assert load_config(write("output: runs/3e-4")).output == "runs/3e-4"
    assert load_config(write("output: x"), ["output=2024"]).output == "2024"


def test_whole_floats_are_whole_numbers(write):
    steps = load_config(write("train: {warmup_steps: 3e3}")).train.warmup_steps
    assert steps == 3000
    assert type(steps) is int


def test_saving_and_loading_gives_an_equal_config(tmp_path):
    config = Config(output="runs/图", deepspeed={"zero_optimization": {"stage": 3}})
    config.model.vit = {"width": 64, "depth": 2, "heads": 4, "patch_size": 8}
    config.train.lr, config.train.eps = 1e-7, 1e-30
    config.train.min_lr = 0.0
    config.data.train, config.data.prompt = ["a b.json", "yes"], "a picture of "
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(to_dict(config)) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole(path) as unfinished:
        unfinished.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), whole(path) as unfinished:
        unfinished.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_overrides_reach_every_kind_of_setting(write):
    config = load_config(
        write("train: {lr: 1e-3}\nmodel: {vit: {width: 64, depth: 2, heads: 4}}"),
        [
            "train.lr=1e-4", "data.train=[a.json, b.json]", "data.prompt=a picture of ", "seed=7", "model.vit.depth=3",
            "deepspeed.zero_optimization.stage=2", "train.deterministic=true", "data.text_hook=",
        ],
    )  # fmt: skip
    assert config.train.lr == 1e-4
    assert config.data.train == ["a.json", "b.json"]
    assert config.data.prompt == "a picture of "
    assert config.seed == 7
    assert config.model.vit == {"width": 64, "depth": 3, "heads": 4}
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}
    assert config.train.deterministic is True


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.lr", "expected name=value"),
        ("train.batch_sise=3", "--set: train.batch_sise is not a setting. Did you mean train.batch_size?"),
        ("train.lr.x=3", "train.lr is"),
        ("data.train=[a", "cannot read the value"),
        ("train.lr=fast", "--set: train.lr is 'fast'; expected a number."),
    ],
)
def test_bad_overrides_are_named(write, override, said):
    assert said in refused(write("train: {lr: 1e-3}"), [override])


@pytest.mark.parametrize(
    "text, name, meant",
    [
        ("train: {batch_sise: 3}", "train.batch_sise", "train.batch_size"),
        ("batch_sise: 3", "batch_sise", "train.batch_size"),
        ("loss: {lr: 1}", "loss.lr", "train.lr"),
        ("trian: {lr: 1}", "trian", "train"),
        ("init_lr: 3e-4", "init_lr", "train.lr"),
        ("train: {init_lr: 3e-4}", "train.init_lr", "train.lr"),
        ("max_epoch: 20", "max_epoch", "train.epochs"),
        ("train_file: [a.json]", "train_file", "data.train"),
        ("batch_size: 75", "batch_size", "train.batch_size"),
        ("vit: base", "vit", "model.vit"),
        ("data: {batchsize: 3}", "data.batchsize", "train.batch_size"),
    ],
)
def test_an_unknown_setting_is_named_with_its_line_and_what_was_meant(write, text, name, meant):
    path = write("# a comment\n" + text)
    assert refused(path) == f"{path}:2: {name} is not a setting. Did you mean {meant}?"


def test_an_unknown_setting_like_no_other_lists_what_there_is(write):
    assert "Known here: loss.itc, loss.itm" in refused(write("loss: {zzzzzz: 1}"))


def test_all_problems_are_told_at_once(write):
    message = refused(write("train:\n  batch_sise: 3\n  lr: fast\nimage_size: 224\n"))
    assert [line.split(": ")[0].rpartition(":")[2] for line in message.splitlines()] == ["2", "3", "4"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("train: {lr: fast}", "train.lr is 'fast'; expected a number."),
        ("train: {lr: true}", "train.lr is True; expected a number."),
        ("train: {lr: .nan}", "train.lr is nan; expected a number."),
        ("train: {batch_size: 1.5}", "train.batch_size is 1.5; expected a whole number."),
        ("train: {betas: 0.9}", "train.betas is 0.9; expected a list of numbers, such as [0.9, 0.999]."),
        ("train: {deterministic: 1}", "train.deterministic is 1; expected true or false."),
        (
            "data: {train: a.json}",
            "data.train is 'a.json'; expected a list of text, such as [a.json, b.json].",
        ),
        ("data: {train: [1]}", "data.train is [1]; expected a list of text, such as [a.json, b.json]."),
        ("output:", "output is None; expected text."),
        ("train: 3", "train is a section; expected settings inside it, found 3."),
        ("deepspeed: 3", "deepspeed is 3; expected a mapping, such as {name: value}."),
    ],
)
def test_a_wrong_type_names_setting_value_and_expected_type(write, text, said):
    path = write(text)
    assert refused(path) == f"{path}:1: {said}"


@pytest.mark.parametrize(
    "text, said",
    [
        ("task: dance", "task is 'dance'; expected one of pretrain"),
        ("train: {schedule: linear}", "expected one of step, cosine, warmup_cosine"),
        ("train: {optimizer: sgd}", "expected one of adamw, deepspeed, apex, muon"),
        ("train: {precision: fp8}", "expected one of fp32, bf16"),
        ("data: {randaugment: weak}", "expected one of official, strong, none"),
        ("train: {batch_size: 0}", "train.batch_size is 0; expected at least 1."),
        ("train: {lr: 0, min_lr: 0}", "train.lr is 0.0; expected above 0."),
        ("train: {lr: 1e-7}", "train.min_lr 1e-06 is above train.lr 1e-07."),
        ("train: {betas: [0.9]}", "expected two numbers from 0 to below 1"),
        ("data: {flip: 1.5}", "data.flip is 1.5; expected at least 0 and at most 1."),
        ("data: {min_scale: 0}", "data.min_scale is 0.0; expected above 0 and at most 1."),
        ("data: {text_hook: nothing}", "expected package.module:function"),
        ("loss: {itc: 0, itm: 0, lm: 0}", "are all 0, so nothing would train"),
        ("loss: {itm: -1}", "loss.itm is -1.0; expected at least 0."),
        ("loss: {temperature: 0.6}", "outside loss.temperature_min 0.001 to loss.temperature_max 0.5"),
        ("evaluate: {min_length: 30}", "evaluate.min_length 30 is above evaluate.max_length 20"),
        ("model: {vit: huge}", "model.vit is 'huge'; expected base, large or {width"),
        ("model: {vit: {width: 64}}", "expected width, depth, heads, patch_size"),
        ("model: {vit: {width: 64, depth: 0, heads: 2}}", "expected positive whole numbers"),
        ("model: {vit: {width: 64, depth: 2, heads: 3}}", "model.vit.width 64 is no multiple of its heads 3"),
        ("model: {image_size: 100}", "model.image_size 100 is no multiple of the patch size 16"),
        ("model: {med_config: 3}", "model.med_config is 3; expected a path or a mapping"),
    ],
)
def test_values_out_of_range_are_refused(write, text, said):
    assert said in refused(write(text))


def test_a_repeated_setting_is_refused_with_both_lines(write):
    path = write("train:\n  lr: 1e-3\n  epochs: 2\n  lr: 1e-4\n")
    assert refused(path) == f"{path}:4: train.lr is set twice, first at {path}:2. Keep one of the two."


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a\n- b\n", "expected settings such as"),
        ("train: {lr: 1\n", "not valid YAML"),
        ("train:\n\tlr: 1\n", "not valid YAML"),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_one_error_naming_it(write, text, said):
    path = write(text)
    message = refused(path)
    assert message.startswith(str(path))
    assert said in message
    assert "\n" not in message


def test_a_missing_or_binary_file_is_named(tmp_path):
    assert refused(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: there is no such config file."
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "not a text file" in refused(tmp_path / "x.yaml")


def test_an_empty_section_keeps_its_defaults(write):
    assert load_config(write("train:\ndeepspeed:\nseed: 3\n")) == dataclasses.replace(Config(), seed=3)


def test_the_shipped_configs_load():
    paths = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        load_config(path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("deepspeed: {zero_optimisation: {stage: 2}}", "Did you mean deepspeed.zero_optimization?"),
        ("deepspeed: {bf16: true}", "deepspeed.bf16 is True; expected a mapping of settings"),
        ("deepspeed: {zero_optimization: null}", "deepspeed.zero_optimization is None; expected a mapping"),
        ("deepspeed: {zero_optimization: {stage: '2'}}", "stage is '2'; expected 0, 1, 2 or 3"),
    ],
)
def test_what_deepspeed_would_pass_over_or_trip_over_is_refused(write, text, said):
    assert said in refused(write(text))


def test_settings_of_deepspeed_that_are_not_known_here_are_handed_on(write):
    config = load_config(write("deepspeed: {compression_training: {a: 1}, zero_optimization: {stage: 3}}"))
    assert config.deepspeed["compression_training"] == {"a": 1}


def test_a_home_folder_is_one(write):
    assert load_config(write("output: ~/runs/a")).output == str(Path.home() / "runs" / "a")
