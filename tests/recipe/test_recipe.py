"""Recipes: defaults, what overrides what, and messages for what is not allowed."""

import json
import os
import pickle
import re
from dataclasses import FrozenInstanceError

import pytest

from hyspark_nnunet.architectures.presets import PRESETS
from hyspark_nnunet.recipe.fields import recipe_fields, variable_name
from hyspark_nnunet.recipe.recipe import FinetuneRecipe, PretrainRecipe, recipe_table_markdown, save_recipe
from hyspark_nnunet.recipe.sources import OTHER_VARIABLES, resolve_recipe

BOTH = pytest.mark.parametrize("recipe_class", [PretrainRecipe, FinetuneRecipe])
COMMON = {
    "preset": "B",
    "num_epochs": 1000,
    "num_iterations_per_epoch": 250,
    "num_val_iterations_per_epoch": 50,
    "save_every": 50,
    "batch_size": None,
    "activation_checkpointing": "light",
    "gradient_accumulation": 1,
    "max_nonfinite_steps": 20,
    "seed": None,
    "initial_lr": 1e-4,
    "weight_decay": 0.04,
    "oversample_foreground_percent": 0.33,
    "input_channel_mapping": None,
}
PRETRAIN = {
    "warmup_fraction": 0.4,
    "final_weight_decay": 0.2,
    "gradient_clip": 5.0,
    "mask_ratio": 0.75,
    "decoder": "unet",
    "decoder_width": None,
    "mask_block": 1,
    "standardise_targets": True,
    "intensity_augmentation": "none",
    "final_validation_cases": 40,
    "num_pictures": 4,
    "picture_every": 50,
    "probe_every": 0,
    "probe_cases": 20,
    "probe_dataset": None,
}
FINETUNE = {
    "optimizer": "adamw",
    "warmup_fraction": 0.05,
    "polynomial_exponent": 0.9,
    "decoder_warmup_epochs": 0,
    "encoder_hold_epochs": 0,
    "layer_decay": None,
}


class TestFields:
    def test_defaults(self):
        assert PretrainRecipe().as_dict() == COMMON | PRETRAIN
        assert FinetuneRecipe().as_dict() == COMMON | FINETUNE

    @BOTH
    def test_every_field_says_what_it_is(self, recipe_class):
        for field in recipe_fields(recipe_class):
            assert all(field.metadata[key] for key in ("help", "unit", "source", "allowed")), field.name

    def test_is_frozen(self):
        with pytest.raises(FrozenInstanceError):
            PretrainRecipe().num_epochs = 5

    def test_survives_a_process_boundary(self):
        recipe = resolve_recipe(PretrainRecipe, {"preset": "S"}, {})
        copy = pickle.loads(pickle.dumps(recipe))
        assert copy == recipe
        assert copy.describe() == recipe.describe()

    def test_recipes_of_equal_values_are_equal(self):
        assert resolve_recipe(PretrainRecipe, {"num_epochs": 1000}, {}) == PretrainRecipe()

    def test_a_whole_number_serves_as_a_float(self):
        value = PretrainRecipe(gradient_clip=1).gradient_clip
        assert isinstance(value, float)


class TestAllowedValues:
    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("preset", "XL", "be one of S, B, L"),
            ("preset", "b", "be one of S, B, L"),
            ("num_epochs", 0, "be at least 1"),
            ("num_iterations_per_epoch", 0, "be at least 1"),
            ("num_val_iterations_per_epoch", 0, "be at least 1"),
            ("save_every", -1, "be at least 1"),
            ("batch_size", 0, "be at least 1 or none"),
            ("initial_lr", 0.0, "be above 0"),
            ("initial_lr", float("nan"), "be finite"),
            ("initial_lr", float("inf"), "be finite"),
            ("weight_decay", -0.1, "be at least 0"),
            ("warmup_fraction", 1.0, "lie in [0, 1)"),
            ("warmup_fraction", -0.1, "lie in [0, 1)"),
            ("oversample_foreground_percent", 33.0, "lie in [0, 1]"),
            ("final_weight_decay", -0.1, "be at least 0"),
            ("gradient_clip", 0.0, "be above 0"),
            ("mask_ratio", 0.0, "lie strictly between 0 and 1"),
            ("mask_ratio", 1.0, "lie strictly between 0 and 1"),
            ("decoder_width", 0, "be at least 1 or none"),
            ("decoder", "hyspark", "be one of unet, reconstruction"),
            ("num_pictures", -1, "be at least 0"),
            ("picture_every", 0, "be at least 1"),
            ("seed", -1, "lie in [0, 2^63) or none"),
            ("seed", 2**63, "lie in [0, 2^63) or none"),
        ],
    )
    def test_refuses_and_says_what_is_allowed(self, field, value, words):
        with pytest.raises(ValueError, match="^" + re.escape(f"{field} is {value!r}, but it must {words}: ")):
            PretrainRecipe(**{field: value})

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("decoder_warmup_epochs", -1, "be at least 0"),
            ("encoder_hold_epochs", -1, "be at least 0"),
            ("layer_decay", 0.0, "lie in (0, 1] or none"),
            ("layer_decay", 1.1, "lie in (0, 1] or none"),
            ("input_channel_mapping", "T1", "be pairs such as T1=CT, T2=CT or none"),
            ("input_channel_mapping", "T1=CT,=CT", "be pairs such as T1=CT, T2=CT or none"),
        ],
    )
    def test_refuses_of_the_fine_tuning(self, field, value, words):
        with pytest.raises(ValueError, match="^" + re.escape(f"{field} is {value!r}, but it must {words}: ")):
            FinetuneRecipe(**{field: value})

    @pytest.mark.parametrize("field", ["decoder_warmup_epochs", "encoder_hold_epochs"])
    def test_the_whole_network_trains_for_an_epoch(self, field):
        FinetuneRecipe(num_epochs=3, **{field: 2})
        with pytest.raises(ValueError, match=f"{field} is 3 and num_epochs 3, but the whole network must train"):
            FinetuneRecipe(num_epochs=3, **{field: 3})

    @pytest.mark.parametrize("value", [0.0, -1.0])
    def test_refuses_an_exponent(self, value):
        with pytest.raises(ValueError, match=f"polynomial_exponent is {value}, but it must be above 0"):
            FinetuneRecipe(polynomial_exponent=value)

    @pytest.mark.parametrize(
        "values",
        [
            *({"preset": preset} for preset in PRESETS),
            {"warmup_fraction": 0.0},
            {"weight_decay": 0.0, "final_weight_decay": 0.0},
            {"oversample_foreground_percent": 1.0},
            {"num_pictures": 0},
            {"seed": 0},
            {"batch_size": 1},
        ],
    )
    def test_takes_the_edges(self, values):
        assert PretrainRecipe(**values).as_dict() == COMMON | PRETRAIN | values

    def test_a_dataset_for_a_probe_that_is_off(self):
        with pytest.raises(ValueError, match="probe_dataset is 6, but probe_every is 0.*HYSPARK_PROBE_EVERY=10"):
            PretrainRecipe(probe_dataset="6")
        assert PretrainRecipe(probe_dataset="6", probe_every=1).probe_dataset == "6"

    def test_weight_decay_cannot_rise_from_zero(self):
        with pytest.raises(ValueError, match=r"weight_decay is 0 and final_weight_decay 0\.2.*set both to 0"):
            PretrainRecipe(weight_decay=0.0)

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("num_epochs", "5", "a whole number"),
            ("num_epochs", True, "a whole number"),
            ("num_epochs", 5.0, "a whole number"),
            ("num_epochs", None, "a whole number"),
            ("seed", 1.5, "a whole number such as 5, or none"),
            ("mask_ratio", True, "a number"),
            ("mask_ratio", "0.5", "a number"),
            ("standardise_targets", 1, "1, 0, true, false, yes or no"),
            ("preset", 1, "text"),
        ],
    )
    def test_refuses_another_type(self, field, value, words):
        message = re.escape(f"{field} is {value!r}, but it must be {words}")
        with pytest.raises(ValueError, match="^" + message):
            PretrainRecipe(**{field: value})
        with pytest.raises(ValueError, match=re.escape(f'{field} in the plan\'s section "hyspark" is {value!r}, but')):
            resolve_recipe(PretrainRecipe, {field: value}, {})

    def test_a_refused_value_says_who_set_it(self):
        with pytest.raises(ValueError, match=r"set by the environment variable HYSPARK_MASK_RATIO"):
            resolve_recipe(PretrainRecipe, None, {"HYSPARK_MASK_RATIO": "1"})
        with pytest.raises(ValueError, match=r"set by the plan"):
            resolve_recipe(PretrainRecipe, {"mask_ratio": 2}, {})


class TestPrecedence:
    LAYERS = (
        ("plan", 2),
        ('plan, "pretrain"', 3),
        ("environment variable HYSPARK_NUM_EPOCHS", 4),
        ("environment variable HYSPARK_PRETRAIN_NUM_EPOCHS", 5),
    )

    def resolve(self, recipe_class, layers):
        section, environment = {}, {}
        for source, value in layers:
            if source == "plan":
                section["num_epochs"] = value
            elif source.startswith("plan"):
                section["pretrain"] = {"num_epochs": value}
            else:
                environment[source.split()[-1]] = str(value)
        return resolve_recipe(recipe_class, section, environment)

    @pytest.mark.parametrize("n", range(1, 5))
    def test_a_later_layer_wins(self, n):
        recipe = self.resolve(PretrainRecipe, self.LAYERS[:n])
        assert (recipe.source_of("num_epochs"), recipe.num_epochs) == self.LAYERS[n - 1]

    def test_layers_of_the_other_trainer_do_not_count(self):
        recipe = self.resolve(FinetuneRecipe, self.LAYERS)
        assert (recipe.source_of("num_epochs"), recipe.num_epochs) == self.LAYERS[2]
        recipe = self.resolve(FinetuneRecipe, self.LAYERS[1:2])
        assert (recipe.source_of("num_epochs"), recipe.num_epochs) == ("default", 1000)

    def test_the_order_in_the_plan_does_not_matter(self):
        for section in (
            {"pretrain": {"num_epochs": 3}, "num_epochs": 2},
            {"num_epochs": 2, "pretrain": {"num_epochs": 3}},
        ):
            assert resolve_recipe(PretrainRecipe, section, {}).num_epochs == 3

    @BOTH
    @pytest.mark.parametrize("section", [None, {}])
    def test_nothing_said_is_the_default(self, recipe_class, section):
        recipe = resolve_recipe(recipe_class, section, {})
        assert recipe == recipe_class()
        assert set(recipe.sources.values()) == {"default"}

    def test_reads_the_environment_of_the_process(self, monkeypatch):
        monkeypatch.setenv("HYSPARK_NUM_EPOCHS", "7")
        assert resolve_recipe(PretrainRecipe, None).num_epochs == 7

    def test_fields_of_the_other_trainer_are_not_used(self):
        section = {"mask_ratio": 0.5, "polynomial_exponent": 2}
        environment = {"HYSPARK_GRADIENT_CLIP": "1", "HYSPARK_PRETRAIN_SEED": "3"}
        assert resolve_recipe(FinetuneRecipe, section, environment).as_dict() == (
            COMMON | FINETUNE | {"polynomial_exponent": 2.0}
        )

    def test_fields_of_the_other_trainer_are_checked(self):
        with pytest.raises(ValueError, match="HYSPARK_GRADIENT_CLIP is 'x', but it must be a number"):
            resolve_recipe(FinetuneRecipe, None, {"HYSPARK_GRADIENT_CLIP": "x"})
        with pytest.raises(ValueError, match='seed in the plan\'s section "hyspark", "pretrain" is \'x\''):
            resolve_recipe(FinetuneRecipe, {"pretrain": {"seed": "x"}}, {})

    @pytest.mark.parametrize("section", [["preset"], "S"])
    def test_a_section_is_a_dictionary(self, section):
        with pytest.raises(ValueError, match=r'section "hyspark" is .* must be a dictionary'):
            resolve_recipe(PretrainRecipe, section, {})
        with pytest.raises(ValueError, match=r'section "hyspark", "finetune" is .* must be a dictionary'):
            resolve_recipe(PretrainRecipe, {"finetune": section}, {})

    def test_none_in_the_environment_takes_back_what_the_plan_says(self):
        assert resolve_recipe(PretrainRecipe, {"batch_size": 8}, {"HYSPARK_BATCH_SIZE": "none"}).batch_size is None


class TestUnknownNames:
    @BOTH
    @pytest.mark.parametrize(
        ("variable", "suggestion"),
        [
            ("HYSPARK_NUM_EPOCH", "HYSPARK_NUM_EPOCHS"),
            ("HYSPARK_num_epochs", None),
            ("HYSPARK_MASKRATIO", "HYSPARK_MASK_RATIO"),
            ("HYSPARK_FINETUNE_EPOCHS", "HYSPARK_FINETUNE_NUM_EPOCHS"),
            ("HYSPARK_FINETUNE_MASK_RATIO", "HYSPARK_"),
            ("HYSPARK_", None),
            ("HYSPARK_SOURCES", None),
            ("HYSPARK_KIND", None),
        ],
    )
    def test_variable(self, recipe_class, variable, suggestion):
        with pytest.raises(ValueError, match=f"unknown name {variable} among the environment variables") as error:
            resolve_recipe(recipe_class, None, {variable: "1"})
        message = str(error.value)
        if suggestion is not None:
            assert f"did you mean {suggestion}" in message and "Valid names" not in message
        else:
            assert "did you mean" not in message
            for name in ("HYSPARK_SEED", "HYSPARK_PRETRAIN_SEED", "HYSPARK_POLYNOMIAL_EXPONENT", *OTHER_VARIABLES):
                assert name in message

    @BOTH
    def test_key_of_the_plan(self, recipe_class):
        with pytest.raises(ValueError, match=r'unknown name mask_ration in .*"hyspark"; did you mean mask_ratio\?'):
            resolve_recipe(recipe_class, {"mask_ration": 0.5}, {})
        with pytest.raises(ValueError, match=r'unknown name xyz in .*"hyspark"\. Valid names: ') as e:
            resolve_recipe(recipe_class, {"xyz": 0.5}, {})
        assert all(name in str(e.value) for name in (*COMMON, *PRETRAIN, *FINETUNE, "pretrain", "finetune"))

    @BOTH
    def test_a_trainers_part_of_the_plan_takes_its_own_fields_only(self, recipe_class):
        with pytest.raises(ValueError, match=r'unknown name mask_ratio in .*"hyspark", "finetune"'):
            resolve_recipe(recipe_class, {"finetune": {"mask_ratio": 0.5}}, {})

    @BOTH
    def test_other_variables_are_left_alone(self, recipe_class):
        environment = dict.fromkeys(OTHER_VARIABLES, "x") | {"nnUNet_raw": "/data", "NOT_HYSPARK_X": "1"}
        assert resolve_recipe(recipe_class, None, environment) == recipe_class()


class TestEnvironmentText:
    @pytest.mark.parametrize(
        ("field", "text", "value"),
        [
            ("num_epochs", "5", 5),
            ("num_epochs", " 5 ", 5),
            ("initial_lr", "1e-3", 1e-3),
            ("initial_lr", "1", 1.0),
            ("preset", "S", "S"),
            *(("standardise_targets", text, True) for text in ("1", "true", "True", "yes", "YES")),
            *(("standardise_targets", text, False) for text in ("0", "false", "FALSE", "no", "No")),
            *(
                (field, text, None)
                for field in ("seed", "batch_size", "decoder_width")
                for text in ("none", "None", "")
            ),
            ("seed", "12", 12),
        ],
    )
    def test_is_read_by_the_fields_type(self, field, text, value):
        recipe = resolve_recipe(PretrainRecipe, None, {variable_name(field): text})
        assert getattr(recipe, field) == value
        assert type(getattr(recipe, field)) is type(value)

    @pytest.mark.parametrize(
        ("field", "text", "words"),
        [
            ("num_epochs", "5.5", "a whole number such as 5:"),
            ("num_epochs", "", "a whole number such as 5:"),
            ("num_epochs", "none", "a whole number such as 5:"),
            ("initial_lr", "fast", "a number such as 0.5 or 1e-4:"),
            ("standardise_targets", "on", "1, 0, true, false, yes or no:"),
            ("standardise_targets", "", "1, 0, true, false, yes or no:"),
            ("seed", "1e3", "a whole number such as 5, or none:"),
        ],
    )
    def test_of_another_type_is_refused(self, field, text, words):
        variable = variable_name(field)
        with pytest.raises(ValueError, match="^" + re.escape(f"{variable} is {text!r}, but it must be {words}")):
            resolve_recipe(PretrainRecipe, None, {variable: text})

    @pytest.mark.parametrize("text", ["nan", "inf"])
    def test_numbers_are_finite(self, text):
        with pytest.raises(ValueError, match=r"initial_lr is .* must be finite"):
            resolve_recipe(PretrainRecipe, None, {"HYSPARK_INITIAL_LR": text})


class TestReports:
    def recipe(self):
        return resolve_recipe(PretrainRecipe, {"preset": "S", "pretrain": {"seed": 3}}, {"HYSPARK_NUM_EPOCHS": "50"})

    def test_description_is_an_aligned_table(self):
        lines = self.recipe().describe().splitlines()
        assert len(lines) == 1 + len(COMMON | PRETRAIN)
        assert len({line.index(line.split(maxsplit=2)[1], line.index(" ")) for line in lines}) == 1
        rows = {line.split(maxsplit=2)[0]: line.split(maxsplit=2)[1:] for line in lines}
        assert rows["preset"] == ["S", "plan"]
        assert rows["seed"] == ["3", 'plan, "pretrain"']
        assert rows["num_epochs"] == ["50", "environment variable HYSPARK_NUM_EPOCHS"]
        assert rows["batch_size"] == ["none", "default"]
        assert rows["standardise_targets"] == ["yes", "default"]

    def test_description_without_resolving(self):
        lines = PretrainRecipe(num_epochs=5).describe().splitlines()
        sources = {line.split()[0]: line.split()[-1] for line in lines}
        assert (sources["num_epochs"], sources["preset"]) == ("argument", "default")

    def test_saved_with_trainer_and_sources(self, tmp_path):
        recipe, path = self.recipe(), tmp_path / "recipe.json"
        path.write_text("of an earlier training")
        save_recipe(recipe, path)
        saved = json.loads(path.read_text())
        assert saved["trainer"] == "pretrain"
        assert PretrainRecipe(**saved["recipe"]) == recipe
        assert saved["sources"].keys() == saved["recipe"].keys()
        assert saved["sources"]["preset"] == "plan"
        assert os.listdir(tmp_path) == ["recipe.json"]

    def test_an_interrupted_save_keeps_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "recipe.json"
        save_recipe(self.recipe(), path)
        before = path.read_text()

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_recipe(FinetuneRecipe(), path)
        assert path.read_text() == before
        assert os.listdir(tmp_path) == ["recipe.json"]

    @BOTH
    def test_values_can_come_back_as_a_section(self, recipe_class):
        recipe = recipe_class(num_epochs=5, preset="L")
        section = json.loads(json.dumps(recipe.as_dict()))
        assert resolve_recipe(recipe_class, section, {}) == recipe

    @BOTH
    def test_markdown_has_a_row_per_field(self, recipe_class):
        header, rule, *rows = recipe_table_markdown(recipe_class).splitlines()
        assert header == "| field | default | unit | meaning | source | environment variable |"
        assert [row.split(" | ")[0] for row in rows] == [f"| `{f.name}`" for f in recipe_fields(recipe_class)]
        assert {row.count(" | ") for row in (rule, *rows)} == {5}
        assert "| `num_epochs` | `1000` | epochs | length of the training | nnU-Net | `HYSPARK_NUM_EPOCHS` |" in rows
