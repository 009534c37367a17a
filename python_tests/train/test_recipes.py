"""Every recipe of the package, and what a wrong one is told."""

import re

import pytest
import torch

yaml = pytest.importorskip("yaml")

from spikecore.cli import main  # noqa: E402
from spikecore.data import list_datasets  # noqa: E402
from spikecore.models import create_model, list_models  # noqa: E402
from spikecore.train.recipe import Recipe, RecipeError, list_recipes, load_recipe  # noqa: E402

NAMES = list_recipes()


def test_every_published_row_has_a_recipe():
    sets = ["cifar10", "caltech101", "cifar10dvs", "ncaltech101", "gtzan", "urbansound8k"]
    wanted = {f"ecsnn_{arch}{act}_{s}" for arch in ("vgg5", "vgg9", "vgg16", "cifarnet") for act in ("", "_ann")
              for s in sets}  # fmt: skip
    wanted |= {f"qkformer_{s}" for s in ("cifar10", "cifar100", "miniimagenet", "cifar10dvs", "dvsgesture")}
    wanted |= {f"qkformer_10_{w}_imagenet" for w in (384, 512, 768)}
    wanted |= {f"{m}_{s}" for m in ("svmamba", "vmamba") for s in ("cifar10", "cifar100", "miniimagenet")}
    wanted |= {f"vmamba_{v}_imagenet" for v in ("tiny_s1l8", "small_s2l15", "base_s2l15")}
    wanted |= {f"spikingformer_8_{w}{kd}_imagenet" for w in (384, 512, 768) for kd in ("", "_kd")}
    wanted |= {f"spikingformer_{v}{kd}_{s}" for v in ("4_256", "2_384", "4_384") for kd in ("", "_kd")
               for s in ("cifar10", "cifar100")}  # fmt: skip
    wanted |= {f"spikingformer_dvs_2_256{kd}_cifar10dvs" for kd in ("", "_kd")}
    wanted |= {f"sew_resnet{d}{kd}_imagenet" for d in (18, 34, 50) for kd in ("", "_kd")}
    wanted |= {f"sew_dvs_wide{kd}_cifar10dvs" for kd in ("", "_kd")}
    wanted |= {f"{m}_vgg8_{s}" for m in ("sma", "sma_azo") for s in ("dvsgesture", "cifar10dvs", "ncaltech101")}
    wanted |= {f"{m}msresnet{d}_imagenet" for m in ("", "sma_", "sma_azo_") for d in (18, 34, 104)}
    wanted |= {"qkformer_test_digits", "qkformer_small_cifar10", "sma_vgg8_test_nmnist"}
    wanted |= {f"ecsnn_{v}_fsdd" for v in ("small", "small_speakers", "small_ann", "tiny", "tiny_kd")}
    assert wanted - set(NAMES) == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_its_model(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.model in list_models()
    assert recipe.data.name in list_datasets()
    assert recipe.run_here is None or len(recipe.run_here) > 10
    with torch.device("meta"):
        net = create_model(recipe.model, **recipe.model_kwargs)
    assert net.num_classes == recipe.num_classes
    if recipe.distill:
        net.get_submodule(recipe.distill["student_feature"])
    if recipe.loss == "tet":
        assert callable(net.steps)
    frames = recipe.data.options.get("frames")
    if recipe.data.name == "spoken_digits":  # of the spectrum: its width
        assert recipe.model_kwargs["img_size"] == [40, frames]
    elif frames and net.T is not None:
        assert frames == net.T


def test_published_settings():
    """Of each kind of rule one, by hand from the published scripts."""
    recipe = load_recipe("qkformer_10_384_imagenet")
    assert recipe.base_lr == pytest.approx(1.2e-3)
    assert (recipe.effective_batch, recipe.epochs, recipe.weight_decay) == (512, 200, 0.05)
    assert load_recipe("qkformer_10_768_imagenet").base_lr == pytest.approx(1.35e-3)
    assert load_recipe("spikingformer_8_768_kd_imagenet").base_lr == pytest.approx(3.5355e-4, rel=1e-4)
    recipe = load_recipe("qkformer_cifar10", ["epochs=4", "data.root=somewhere", "lr=1e-4", "model_kwargs.T=2"])
    assert (recipe.epochs, recipe.data.root, recipe.lr, recipe.model_kwargs["T"]) == (4, "somewhere", 1e-4, 2)
    assert (recipe.mixup, recipe.mixup_off_epoch, recipe.img_size) == (0.5, 200, 32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epoch=3"], r"there is no key epoch; did you mean epochs"),
        (["data.rot=x"], r"there is no key data\.rot; did you mean data\.root\?"),
        (["epochs=many"], r"epochs must be a whole number, got 'many'"),
        (["epochs=0"], r"epochs must be at least 1, got 0"),
        (["lr=fast"], r"lr must be a number, got 'fast'"),
        (["amp=3"], r"amp must be true or false, got 3"),
        (["loss=hinge"], r"loss must be one of ce, tet, mse, got 'hinge'"),
        (["model=qkformer_4_385"], r"there is no model 'qkformer_4_385'; did you mean qkformer_4_384"),
        (["model_kwargs=null"], r"model_kwargs must be a section of keys, got None"),
        (["data=[1"], r"no YAML"),
        (["epochs"], r"must be KEY=VALUE"),
        (["lr.x=1"], r"lr is no section"),
        (["model_kwargs.num_classes=null"], r"num_classes is missing"),
        (["published=[{value: 3}]"], r"an entry of published has the keys"),
    ],
)
def test_wrong_overrides(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("qkformer_cifar10", overrides)


def test_files_and_bases(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: qkformer_cifar10\nmodel_kwargs: {T: 1}\nlr: 5e-4\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.name, recipe.lr, recipe.model_kwargs) == ("mine", 5e-4, {"T": 1, "num_classes": 10})
    (tmp_path / "next.yaml").write_text("base: mine\nepochs: 7\n")
    assert load_recipe(tmp_path / "next.yaml").lr == 5e-4
    for text, message in (
        ("- a list", "a recipe consists of keys"),
        ("base: qkformer_cifar11", "there is no recipe 'qkformer_cifar11'; did you mean qkformer_cifar10"),
        ("model: qkformer_test\nmodel_kwargs: {num_classes: 2}", "the key data is missing"),
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / "wrong.yaml")
    with pytest.raises(RecipeError, match="there is no file"):
        load_recipe(tmp_path / "none.yaml")


def test_the_table(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(NAMES) + 2
    assert re.search(r"^qkformer_cifar10 +qkformer_4_384 +cifar10 +400 +96\.18 %", out, re.M)
    assert main(["recipes", "svmamba_*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert main(["recipes", "qkformr_cifar10"]) == 1
    assert "did you mean qkformer_cifar10" in capsys.readouterr().err


def test_a_card_holds_the_whole_recipe():
    recipe = load_recipe("spikingformer_dvs_2_256_kd_cifar10dvs")
    from spikecore.train.recipe import recipe_of

    assert recipe_of(recipe.to_dict(), "card") == recipe
    assert isinstance(recipe, Recipe)
