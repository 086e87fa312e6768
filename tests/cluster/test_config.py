"""The configuration: what loads, what is refused and how, and that it comes back equal."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import (
    ClusterConfig,
    ConfigError,
    PretrainConfig,
    config_from_mapping,
    known_keys,
    load_config,
)
from trainer.settings import DataSettings, MemorySettings, OptimSettings, RuntimeSettings

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs").glob("*.toml")
    # Other commands': see test_finetune.py, test_adapt_compare.py and test_in_task.py.
    if not path.stem.startswith(("finetune-", "adaptation", "in-task"))
)
SMALLEST = {"data": {"corpus": "some/corpus"}}


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('[data]\ncorpus = "some/corpus"\n[memory]\ntop_k = 3\n')
    return path


def refusal(*overrides: str, tree: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        config_from_mapping(SMALLEST if tree is None else tree, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load_and_come_back_equal(path: Path) -> None:
    config = load_config(path)
    assert config_from_mapping(tomllib.loads(config.to_toml())) == config


def test_the_shipped_configurations_are_found() -> None:
    found = {path.stem for path in CONFIGS}
    assert {"quickstart", "synthetic", "pluglm-base", "pluglm-base-1b"} <= found


def test_pluglm_base_has_the_papers_numbers() -> None:
    config = load_config(next(path for path in CONFIGS if path.stem == "pluglm-base"))
    assert (config.optim.batch_size, config.optim.steps) == (65_536, 8_000)
    assert (config.memory.top_k, config.memory.refresh_every_steps) == (5, 200)
    assert (config.model.memory_layers, config.model.key_size) == (1, 128)
    assert (config.model.value_pooling, config.model.query_norm) == ("shared", "batch")
    assert config.optim.retrieval_warmup_steps == 0
    assert config.runtime.trainers * config.micro_batch_size * config.accumulation_steps == 65_536


def test_missing_keys_take_their_defaults(toml: Path) -> None:
    config = load_config(toml)
    assert config.memory == MemorySettings(top_k=3)
    assert config.optim == OptimSettings()


def test_overrides_win_over_the_file_and_later_ones_over_earlier(toml: Path) -> None:
    config = load_config(toml, ["memory.top_k=8", "memory.top_k=9"])
    assert config.memory.top_k == 9


@pytest.mark.parametrize(
    ("override", "section", "value"),
    [
        ("optim.lr=1", "optim", 1.0),
        ("optim.lr=5e-4", "optim", 5e-4),
        ("optim.betas=[0, 0.5]", "optim", (0.0, 0.5)),
        ("memory.exclude_own_document=true", "memory", True),
        ("memory.refresh=sync", "memory", "sync"),
        ('memory.refresh="sync"', "memory", "sync"),
        ("run.name=2024", "run", "2024"),
        ("run.name=2024-01-02", "run", "2024-01-02"),
        ("run.name=", "run", ""),
        ("run.name=a = b", "run", "a = b"),
        ("run.name=1\nseed = 2", "run", "1\nseed = 2"),
        ("data.corpus=/a b/c.d", "data", "/a b/c.d"),
    ],
)
def test_override_values_are_toml_literals_and_else_text(
    override: str, section: str, value: Any
) -> None:
    config = config_from_mapping(SMALLEST, [override])
    read = getattr(getattr(config, section), override.partition("=")[0].partition(".")[2])
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("memory.topk=8", "memory.top_k"),
        ("memroy.top_k=8", "memory.top_k"),
        ("optim.top_k=8", "memory.top_k"),
        ("top_k=8", "memory.top_k"),
        ("optim.learning_rate=1", "[optim] has optimizer, steps, batch_size, batch_tokens,"),
        ("nothing.alike=1", "the sections are run, data, model, memory,"),
        ("memory.store.path=x", "memory.store"),
    ],
)
def test_unknown_override_names_what_is_nearest(override: str, nearest: str) -> None:
    message = refusal(override)
    assert message.startswith(override.partition("=")[0] + ": unknown key; ")
    assert nearest in message


def test_unknown_names_in_a_file_name_what_is_nearest() -> None:
    assert "did you mean memory.shards?" in refusal(tree={**SMALLEST, "memory": {"shard": 2}})
    assert "did you mean [memory]?" in refusal(tree={**SMALLEST, "memori": {"shards": 2}})
    assert "did you mean run.seed?" in refusal(tree={**SMALLEST, "seed": 1})
    assert "write [memory]" in refusal(tree={**SMALLEST, "memory": 3})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memory.top_k=0", "memory.top_k = 0: must be at least 1"),
        ("memory.top_k=2.5", "memory.top_k = 2.5: must be a whole number"),
        ("memory.top_k=true", "memory.top_k = true: must be a whole number"),
        ("memory.top_k=many", 'memory.top_k = "many": must be a whole number'),
        ("memory.exclude_own_document=1", "memory.exclude_own_document = 1: must be true or false"),
        ("memory.refresh=asink", '"off"; did you mean "async"?'),
        ("memory.refresh=[1]", 'memory.refresh = [1]: must be one of "async", "sync", "off"'),
        ("memory.key_dtype=int4", 'memory.key_dtype = "int4": must be one of "float32"'),
        ("memory.gpus_per_shard=1.5", "must be a whole number when above 1"),
        ("memory.max_staleness_steps=49", "at least memory.refresh_every_steps = 50"),
        ("runtime.zero_stage=4", "runtime.zero_stage = 4: must be from 0 to 3"),
        ("runtime.trainers=3", "optim.batch_size = 64: must be a multiple of runtime.trainers = 3"),
        ("runtime.micro_batch_size=5", "must divide the 32 sequences of each trainer"),
        ("model.num_heads=3", "must divide model.hidden_size = 256"),
        ("model.memory_layers=5", "must be at most model.num_layers = 4"),
        ("model.dropout=1", "model.dropout = 1.0: must be at least 0 and below 1"),
        ("optim.optimizer=sgd", 'optim.optimizer = "sgd": must be one of "adamw", "lamb"'),
        ("optim.lr=0", "optim.lr = 0.0: must be above 0"),
        ("optim.lr=nan", "optim.lr = nan: must be a finite number"),
        ("optim.lr=inf", "optim.lr = inf: must be a finite number"),
        ("optim.lr=fast", 'optim.lr = "fast": must be a number'),
        ("optim.betas=[0.9]", "optim.betas = [0.9]: must be a list of 2 numbers"),
        ("optim.betas=[0.9, 1.0]", "optim.betas = [0.9, 1.0]: must be at least 0 and below 1"),
        ("optim.betas=[0.9, true]", "optim.betas = [0.9, true]: must be a number"),
        ("data.corpus=", "data.corpus is empty"),
        ("data.corpus=\udcff", "must be valid Unicode text"),
        ("run.dir=", "run.dir is empty"),
        ("logging.wandb_project=", None),
        ("cluster.address=nowhere", 'must be one of "local", "auto" or host:port'),
        ("cluster.address=host:99999", 'must be one of "local", "auto" or host:port'),
        ("cluster.ray_temp_dir=here", "must be an absolute path"),
        ("memory.top_k", "write overrides as section.key=value"),
    ],
)
def test_impossible_values_are_refused_with_one_line(override: str, message: str | None) -> None:
    if message is None:
        # A project is needed only where there is somebody to tell it to.
        config_from_mapping(SMALLEST, [override])
        assert "name the project" in refusal(override, "logging.wandb=offline")
    else:
        assert message in refusal(override)


def test_values_that_contradict_each_other_are_refused() -> None:
    assert "never refreshed" in refusal("memory.refresh=off", "memory.max_staleness_steps=100")
    assert "needs runtime.zero_stage of at least 1, not 0" in refusal(
        "runtime.offload_optimizer=cpu", "runtime.zero_stage=0"
    )
    assert "needs runtime.zero_stage of at least 3, not 2" in refusal(
        "runtime.offload_parameters=cpu"
    )
    nvme = ["runtime.offload_optimizer=nvme", "runtime.zero_stage=3"]
    assert "with runtime.nvme_path" in refusal(*nvme)
    on_cpu = [*nvme, "runtime.nvme_path=/fast", "runtime.device=cpu"]
    assert "needs GPUs and DeepSpeed's async_io operator" in refusal(*on_cpu)
    assert "weighs whole entries" in refusal("model.memory_attention=sentence_level")
    assert "must be 1 to 3" in refusal("model.entry_encoder=first_n")
    assert "must be 0" in refusal("model.entry_encoder_layers=1")


def test_the_corpus_has_no_default() -> None:
    assert "data.corpus is missing" in refusal(tree={})


def test_sections_check_themselves_without_a_file() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.zero_stage = 4"):
        RuntimeSettings(zero_stage=4)
    with pytest.raises(ConfigError, match=r"optim\.batch_size = 3"):
        PretrainConfig(data=DataSettings(corpus="c"), optim=OptimSettings(batch_size=3))


def test_a_configuration_cannot_be_changed() -> None:
    config = config_from_mapping(SMALLEST)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.memory.top_k = 9  # type: ignore[misc]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'[run]\nname = "\xe9"\n')
    (tmp_path / "broken.toml").write_text("[run\n")
    for name, reason in [
        ("none.toml", "no such file"),
        ("latin.toml", "not UTF-8 text at byte 14"),
        ("broken.toml", "not valid TOML"),
        (".", "cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=reason) as error:
            load_config(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_accumulation_covers_the_batch() -> None:
    config = config_from_mapping(SMALLEST, ["runtime.micro_batch_size=8"])
    assert (config.micro_batch_size, config.accumulation_steps) == (8, 4)
    assert config_from_mapping(SMALLEST).accumulation_steps == 1


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.1:6379", "head-1:1", "[::1]:6379"])
def test_addresses(address: str) -> None:
    assert ClusterConfig(address=address).address == address


def test_every_key_says_what_it_means() -> None:
    for section, kind in get_type_hints(PretrainConfig).items():
        assert section == kind.SECTION
        for item in dataclasses.fields(kind):
            assert item.metadata["help"].endswith("."), f"{section}.{item.name}"


TEXT = st.text(st.characters(codec="utf-8"))
NOT_BLANK = TEXT.filter(str.strip)
# Keys whose values depend on more than their own declaration.
CONSISTENT: dict[str, st.SearchStrategy[Any]] = {
    "run.dir": NOT_BLANK,
    "data.corpus": NOT_BLANK,
    "logging.wandb_project": NOT_BLANK,
    "cluster.address": st.sampled_from(["local", "auto", "head:6379"]),
    "cluster.ray_temp_dir": st.sampled_from(["", "/tmp/r\u00e4y"]),
    "model.hidden_size": st.sampled_from([64, 768]),
    "model.num_heads": st.sampled_from([1, 2, 4]),
    "model.num_layers": st.integers(4, 100),
    "model.memory_layers": st.integers(1, 4),
    "model.memory_attention": st.sampled_from(["multi_head", "single_head"]),
    "memory.max_staleness_steps": st.just(0),
    "memory.exclude_own_document_share": st.just(1.0),
    "memory.gpus_per_shard": st.floats(0, 1),
    "optim.batch_size": st.sampled_from([64, 65_536]),
    "model.entry_encoder": st.just("word_embedding"),
    "model.entry_encoder_layers": st.just(0),
    "runtime.gpus_per_trainer": st.floats(0.51, 1),
    "runtime.trainers": st.sampled_from([1, 2, 4]),
    "recovery.min_trainers": st.sampled_from([0, 1]),
    "runtime.micro_batch_size": st.sampled_from([0, 2, 16]),
    "runtime.precision": st.sampled_from(["fp32", "bf16"]),
    "runtime.offload_optimizer": st.just("none"),
    "runtime.offload_parameters": st.just("none"),
}


def values_of(hint: Any, metadata: Any) -> st.SearchStrategy[Any]:
    """Values that a field accepts, by its declaration."""
    low = metadata.get("minimum", metadata.get("above", 0))
    high = metadata.get("maximum", metadata.get("below", 1e12))
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(int(low), int(high))
    if hint is float:
        return st.floats(
            low, high, exclude_min="above" in metadata, exclude_max="below" in metadata
        )
    if hint is str:
        return TEXT
    if get_args(hint)[1:] == (...,):
        # What such lists hold is checked across keys; one that may be empty always fits so.
        part = values_of(get_args(hint)[0], metadata)
        empty = "may_be_empty" in metadata
        return st.just(()) if empty else st.lists(part, min_size=1, max_size=3).map(tuple)
    if get_origin(hint) is tuple:
        return st.tuples(*(values_of(part, metadata) for part in get_args(hint)))
    assert get_origin(hint) is Literal
    return st.sampled_from(get_args(hint))


@st.composite
def trees(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Any subset of the keys, each with a value that it may have."""
    tree: dict[str, dict[str, Any]] = {"data": {"corpus": draw(NOT_BLANK)}}
    kinds = get_type_hints(PretrainConfig)
    for section, keys in known_keys().items():
        metadata = {item.name: item.metadata for item in dataclasses.fields(kinds[section])}
        for key in draw(st.lists(st.sampled_from(sorted(keys)), unique=True)):
            values = values_of(keys[key], metadata[key])
            tree.setdefault(section, {})[key] = draw(CONSISTENT.get(f"{section}.{key}", values))
    return tree


@given(trees())
def test_every_configuration_comes_back_equal_from_its_toml(tree: dict[str, Any]) -> None:
    config = config_from_mapping(tree)
    assert config_from_mapping(tomllib.loads(config.to_toml())) == config
    for section, values in tree.items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value


@given(TEXT)
def test_any_text_comes_back_equal(name: str) -> None:
    config = config_from_mapping({"data": {"corpus": "c"}, "run": {"name": name}})
    assert tomllib.loads(config.to_toml())["run"]["name"] == name
