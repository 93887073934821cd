from pathlib import Path

import pytest

from deadpan.config.keys import keys
from deadpan.config.loader import bundled, bundled_text, dump_recipe, load_recipe
from deadpan.config.schema import Data, Evaluation, Optimizer, Recipe
from deadpan.errors import DeadpanError
from deadpan.train.optimizers import learning_rate
from deadpan.train.schedule import resolve

MINIMAL = "model: some/model\ndata: {train: train.json}\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(MINIMAL, encoding="utf-8")
    return file


def refused(file: Path, text: str | bytes, *overrides: str) -> DeadpanError:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DeadpanError) as caught:
        load_recipe(file, overrides)
    return caught.value


def test_defaults_are_the_walkthroughs_figures(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert (recipe.micro_batch_size, recipe.gradient_accumulation_steps, recipe.epochs) == (8, 2, 8)
    assert recipe.optimizer == Optimizer(
        name="adamw", lr="auto", betas=(0.9, 0.999), weight_decay=0.05, eps=1e-8, max_grad_norm=1.0
    )
    assert learning_rate(recipe.optimizer) == 1e-5
    assert resolve(recipe.schedule, "adamw") == ("cosine", 0.03)
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (128, 256, 0.05)
    assert (recipe.lora.target_modules, recipe.max_length) == ("all-linear", 8192)


@pytest.mark.parametrize(
    ("name", "differences"),
    [
        ("internvl2-2b-lora", {"packing": True}),
        ("internvl2-2b-qlora", {"packing": True, "quantization": "nf4"}),
        (
            "internvl2-2b-dadapt",
            {
                "packing": True,
                "quantization": "nf4",
                "optimizer": Optimizer(name="dadapt_adam", lr=1.0),
                "micro_batch_size": 12,
                "data": Data(train=Path("ex_cn.json"), validation=0.05),
                "evaluation": Evaluation(early_stopping_patience=2),
            },
        ),
        (
            "internvl2-8b-qlora",
            {
                "packing": True,
                "quantization": "nf4",
                "micro_batch_size": 4,
                "gradient_accumulation_steps": 4,
            },
        ),
    ],
)
def test_bundled_recipes_are_the_defaults_but_for_what_they_say(
    name: str, differences: dict[str, object]
) -> None:
    recipe = load_recipe(name)
    plain = Recipe(
        model=f"OpenGVLab/InternVL2-{name.split('-')[1].upper()}",
        data=Data(train=Path("ex_cn.json")),
        run=f"runs/{name}",
    )
    assert recipe == plain.model_copy(update=differences)
    samples = recipe.micro_batch_size * recipe.gradient_accumulation_steps
    assert samples == (24 if name.endswith("dadapt") else 16)


def test_bundled_descriptions_are_the_first_comments() -> None:
    descriptions = bundled()
    assert list(descriptions) == sorted(descriptions)
    for name, description in descriptions.items():
        assert bundled_text(name).startswith(f"# {description}\n")
        assert len(description) > 20


@pytest.mark.parametrize("name", ["internvl2-2b-lora", "internvl2-8b-qlora"])
def test_dump_round_trips_and_is_complete(name: str, tmp_path: Path) -> None:
    # Strings that YAML would read as another type, Chinese, and an emoji beyond the basic plane.
    awkward = [
        "run='1e-4'",
        "model=模型 😐",
        "data.images='null'",
        "lora.target_modules=['on','12']",
    ]
    recipe = load_recipe(name, awkward)
    assert (recipe.run, recipe.data.images) == ("1e-4", Path("null"))
    text = dump_recipe(recipe)
    assert "模型 😐" in text
    file = tmp_path / "resolved.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_recipe(file) == recipe
    assert dump_recipe(load_recipe(file)) == text
    leaves = [key.name.rpartition(".")[2] for key in keys().values()]
    assert [line.strip().partition(":")[0] for line in text.splitlines()] == leaves


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".0001", "0.0001", "+1e-04"])
def test_numbers_are_yaml_1_2_in_files_and_overrides(text: str, recipe_file: Path) -> None:
    assert load_recipe(recipe_file, [f"optimizer.lr={text}"]).optimizer.lr == 1e-4
    recipe_file.write_text(MINIMAL + f"optimizer: {{lr: {text}}}", encoding="utf-8")
    assert load_recipe(recipe_file).optimizer.lr == 1e-4


def test_overrides_win_over_the_file_and_the_last_wins(recipe_file: Path) -> None:
    recipe_file.write_text(MINIMAL + "epochs: 3\noptimizer:\n", encoding="utf-8")
    overrides = [
        "epochs=4",
        "epochs=5",
        "optimizer.lr=1",
        "lora.target_modules=[wq, wk]",
        "max_steps=10",
        "data.workers=0",
        "device=cuda:1",
        "run=a=b",
    ]
    recipe = load_recipe(str(recipe_file), overrides)
    assert (recipe.epochs, recipe.optimizer.lr, recipe.max_steps) == (5, 1.0, 10)
    assert (recipe.lora.target_modules, recipe.data.workers) == (["wq", "wk"], 0)
    assert (recipe.data.train, recipe.run) == (Path("train.json"), "a=b")


def test_a_file_may_start_with_a_byte_order_mark(recipe_file: Path) -> None:
    recipe_file.write_text(MINIMAL, encoding="utf-8-sig")
    assert load_recipe(recipe_file).model == "some/model"


@pytest.mark.parametrize(
    ("text", "key", "expected", "found"),
    [
        ("epochs: '8'", "epochs", "integer >= 1", "'8'"),
        ("epochs: 0", "epochs", "integer >= 1", "0"),
        ("epochs: true", "epochs", "integer >= 1", "true"),
        ("epochs: 2.0", "epochs", "integer >= 1", "2.0"),
        ("seed: 4294967296", "seed", "integer >= 0 and <= 4294967295", "4294967296"),
        ("packing: yes", "packing", "true or false", "yes"),
        ("max_tiles: 0", "max_tiles", "integer >= 1 or null", "0"),
        ("device: tpu", "device", "one like auto, cpu, cuda, cuda:0", "tpu"),
        ("run: ''", "run", "string that is not empty", "''"),
        ("attention: fast", "attention", "auto, eager, sdpa, flash or varlen", "fast"),
        ("optimizer:", "optimizer", "mapping of name, lr, betas", "null"),
        ("optimizer: {lr: -1}", "optimizer.lr", "number > 0", "-1"),
        ("optimizer: {lr: .nan}", "optimizer.lr", "number > 0", ".nan"),
        ("optimizer: {weight_decay: .inf}", "optimizer.weight_decay", "number >= 0", ".inf"),
        ("optimizer: {name: sgd}", "optimizer.name", "adamw", "sgd"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas", "[number >= 0 and < 1, num", "[0.9]"),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas", "[number >= 0 and", "[0.9, 1]"),
        ("lora: {target_modules: []}", "lora.target_modules", "list of at least 1 string", "[]"),
        ("lora: {target_modules: wq}", "lora.target_modules", "all-linear or list of", "wq"),
        ("schedule: {warmup_ratio: 1}", "schedule.warmup_ratio", "number >= 0 and < 1", "1"),
    ],
)
def test_a_wrong_value_names_key_expected_and_found(
    text: str, key: str, expected: str, found: str, recipe_file: Path
) -> None:
    error = refused(recipe_file, MINIMAL + text)
    assert repr(key) in error.what
    assert error.where == str(recipe_file)
    assert expected in (error.expected or "")
    assert error.found == found
    assert "deadpan recipe show" in (error.fix or "")


@pytest.mark.parametrize("workers", ["-1", "many", "1.5"])
def test_both_branches_of_a_union_are_one_mistake(workers: str, recipe_file: Path) -> None:
    error = refused(recipe_file, MINIMAL, f"data.workers={workers}")
    assert error.where == f"override data.workers={workers}"
    assert (error.expected, error.found) == ("integer >= 0 or auto", workers)


@pytest.mark.parametrize(
    ("text", "key", "fix"),
    [
        ("optimizr: 1", "optimizr", "did you mean 'optimizer'?"),
        ("optimizer: {lrr: 1}", "optimizer.lrr", "did you mean 'lr'?"),
        ("lr: 1e-4", "lr", "did you mean 'optimizer.lr'?"),
        ("name: adamw", "name", "did you mean 'optimizer.name' or 'schedule.name'?"),
        ("schedule: {zzz: 1}", "schedule.zzz", "choose one of name, warmup_ratio"),
        ("data.workers: 0", "data.workers", "write it as data: {workers: ...}"),
        ("base: other.yaml", "base", "choose one of adapter, attention, data"),
        ("7: 1", "7", "choose one of adapter, attention, data"),
    ],
)
def test_an_unknown_key_names_the_nearest(text: str, key: str, fix: str, recipe_file: Path) -> None:
    error = refused(recipe_file, MINIMAL + text)
    assert error.what == f"The recipe's key {key!r} is unknown."
    assert error.where == str(recipe_file)
    assert fix in (error.fix or "")


def test_an_unknown_key_in_an_override_names_the_override(recipe_file: Path) -> None:
    error = refused(recipe_file, MINIMAL, "epochs=1", "optimiser.lr=1")
    assert error.where == "override optimiser.lr=1"
    assert error.fix == "did you mean 'optimizer'?"


def test_a_missing_key_is_named_to_the_leaf(recipe_file: Path) -> None:
    error = refused(recipe_file, "model: some/model")
    assert "'data.train' is missing" in error.what
    assert (error.expected, error.fix) == ("path", "add data.train")


def test_all_mistakes_come_in_one_error(recipe_file: Path) -> None:
    text = "epochs: 0\nfoo: 1\noptimizer: {lr: -1, betas: [x, 2]}\n"
    error = refused(recipe_file, text, "micro_batch_size=few")
    assert error.what == "The recipe has 7 mistakes."
    assert error.where == str(recipe_file)
    found = (error.found or "").strip().splitlines()
    assert {line.split()[0] for line in found} == {
        "model",
        "data.train",
        "epochs",
        "foo",
        "optimizer.lr",
        "optimizer.betas",
        "micro_batch_size",
    }
    by_key = {line.split()[0]: line.strip() for line in found}
    assert by_key["epochs"] == "epochs has a wrong value: expected integer >= 1, found 0"
    assert by_key["micro_batch_size"].endswith("found few (override micro_batch_size=few)")


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        ("a: 1\nb: [1,", ", line 2, column 7", "expected"),
        ("a: 1\n\tb: 1", ", line 2, column 1", r"'\t'"),
        ("epochs: 1\nrun: x\nepochs: 2", ", line 3, column 1", "'epochs' stands twice"),
        ("a: 1\nb: \x01", ", line 2, column 4", "U+0001"),
        ("a: !!python/object:os.system x", ", line 1, column 4", "python/object"),
        ("a: !!timestamp 2026-01-01", ", line 1, column 4", "timestamp"),
        ("? [1, 2]\n: 3", ", line 1, column 3", "unhashable"),
        ("seed: !!int x", "", "cannot be read"),
        ("seed: " + "9" * 5000, "", "cannot be read"),
        ("a: " + "[" * 3000, "", "cannot be read"),
    ],
)
def test_bad_yaml_names_line_and_column(
    text: str, place: str, found: str, recipe_file: Path
) -> None:
    error = refused(recipe_file, text)
    assert error.what == "The recipe is not valid YAML."
    assert error.where == f"{recipe_file}{place}"
    assert found in (error.found or "")
    assert ("tabs" in (error.fix or "")) == (found == r"'\t'")


def test_bad_yaml_in_an_override_names_the_override(recipe_file: Path) -> None:
    error = refused(recipe_file, MINIMAL, "optimizer.betas=[0.9,")
    assert (error.where or "").startswith("override optimizer.betas=[0.9,, line 1")


@pytest.mark.parametrize("override", ["epochs", "=3", ""])
def test_an_override_needs_a_key_and_an_equals_sign(override: str, recipe_file: Path) -> None:
    error = refused(recipe_file, MINIMAL, override)
    assert error.where == f"override {override}"
    assert error.expected == "KEY=VALUE, such as optimizer.lr=1e-4"


@pytest.mark.parametrize(
    ("content", "what", "found"),
    [
        (b"- 1\n- 2", "not a mapping", "[1, 2]"),
        ("run: 冷笑话".encode("gb18030"), "not UTF-8", "0xc0 at position 5"),
    ],
)
def test_a_file_that_is_no_recipe(content: bytes, what: str, found: str, recipe_file: Path) -> None:
    error = refused(recipe_file, content)
    assert what in error.what
    assert found in (error.found or "")


@pytest.mark.parametrize("name", ["internvl2-2b-lara", "internvl2-2b-lora.yaml"])
def test_a_missing_recipe_names_the_nearest_bundled(name: str, tmp_path: Path) -> None:
    with pytest.raises(DeadpanError, match="no such recipe") as caught:
        load_recipe(name)
    assert caught.value.where == name
    assert "'internvl2-2b-lora'" in (caught.value.fix or "")
    with pytest.raises(DeadpanError) as caught:
        load_recipe(tmp_path)
    assert caught.value.found == "a folder"


def test_every_key_is_described() -> None:
    for key in keys().values():
        assert key.description.endswith("."), key.name
        assert key.expected, key.name


@pytest.mark.parametrize(
    ("overrides", "samples"),
    [
        ((), 16),
        (("micro_batch_size=3", "gradient_accumulation_steps=5"), 15),
        (("micro_batch_size=auto",), 16),
        (("micro_batch_size=auto", "gradient_accumulation_steps=3"), 24),
        (("micro_batch_size=auto", "samples_per_step=12"), 12),
        (("samples_per_step=16",), 16),
    ],
)
def test_a_step_has_the_same_samples_however_it_is_cut(
    recipe_file: Path, overrides: tuple[str, ...], samples: int
) -> None:
    assert load_recipe(recipe_file, overrides).effective_batch_size == samples


def test_samples_per_step_may_not_contradict_a_given_micro_batch_size(recipe_file: Path) -> None:
    error = refused(recipe_file, MINIMAL, "samples_per_step=12")
    assert error.what == "The recipe's key 'samples_per_step' has a wrong value."
    assert error.found == "12"
    assert error.expected == (
        "16, which is micro_batch_size x gradient_accumulation_steps; null; "
        "or any number with micro_batch_size: auto"
    )
    error = refused(recipe_file, MINIMAL, "samples_per_step=0")
    assert error.expected == "integer >= 1 or null"


def test_preference_training_refuses_what_it_does_not_do(recipe_file: Path) -> None:
    error = refused(recipe_file, MINIMAL, "objective=dpo", "quantization=fp8")
    assert error.what == "The recipe's key 'quantization' has a wrong value."
    assert error.expected == "none or nf4 with objective: dpo"
    error = refused(recipe_file, MINIMAL, "dpo.beta=0.5")
    assert error.expected == "objective: dpo, which alone reads this section"
    assert load_recipe(recipe_file, ["objective=dpo", "dpo.beta=0.5"]).dpo.beta == 0.5


@pytest.mark.parametrize(
    ("key", "value"),
    [("decoder", "transformers"), ("distributed.engine", "fsdp2"), ("objective", "dpo")],
)
def test_a_shared_prefix_goes_with_the_fused_decoder_alone(
    recipe_file: Path, key: str, value: str
) -> None:
    error = refused(recipe_file, MINIMAL, "shared_prefix=true", f"{key}={value}")
    assert error.what == "The recipe's key 'shared_prefix' has a wrong value."
    assert (error.expected or "").startswith(f"false with {key}: {value}")


def test_the_folder_of_a_run_is_told_where_its_recipe_is(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    with pytest.raises(DeadpanError) as caught:
        load_recipe(tmp_path)
    assert caught.value.found == "a folder"
    assert caught.value.fix == f"the recipe of this run is {tmp_path / 'recipe.yaml'}"
