"""picogpt/model_dirs.py: which directory a name means."""

from pathlib import Path

import pytest

from picogpt.model_dirs import OPENAI_SIZES, ModelDirError, find_model_dir, known_models, model_dirs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, cache and environment."""
    home = tmp_path / "home"
    for name in ("HOME", "USERPROFILE", "WIN_PD_OVERRIDE_LOCAL_APPDATA", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.delenv("PICOGPT_MODELS_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return home


def make(directory, *, whole=True):
    directory.mkdir(parents=True)
    if whole:
        (directory / "checkpoint").touch()
    return directory


def test_models_dir_then_the_environment_then_models_then_the_cache(elsewhere, monkeypatch):
    (cache,) = model_dirs()
    assert cache.is_relative_to(elsewhere) and cache.parts[-2:] == ("picogpt", "models")
    Path("models").mkdir()
    assert model_dirs() == [Path("models"), cache]
    monkeypatch.setenv("PICOGPT_MODELS_DIR", "")
    assert model_dirs() == [Path("models"), cache]
    monkeypatch.setenv("PICOGPT_MODELS_DIR", "~/mine")
    assert model_dirs() == [elsewhere / "mine"]
    assert model_dirs("given") == [Path("given")] and model_dirs("~no such user") == [Path("~no such user")]


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def no_home(*_, **__):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("platformdirs.user_cache_path", no_home)
    assert model_dirs() == [Path("models")] and find_model_dir("shakespeare")


def test_a_model_is_found_in_either_place(elsewhere):
    (cache,) = model_dirs()
    for name in ("124M", "mine"):
        in_cache = make(cache / name)
        assert find_model_dir(name) == in_cache
        in_models = make(Path("models", name))
        assert find_model_dir(name) == in_models
    make(cache / "other")
    assert known_models() == {**{n: Path("models", n) for n in ("124M", "mine")}, "other": cache / "other"}


@pytest.mark.parametrize("size", OPENAI_SIZES)
def test_a_known_model_that_is_not_there_or_not_whole(tmp_path, size):
    assert find_model_dir(size) is find_model_dir(size, tmp_path) is None
    directory = make(tmp_path / "models" / size, whole=False)
    assert find_model_dir(size) is None
    (directory / "hparams.json").touch()
    assert find_model_dir(size) is None
    (directory / "config.json").touch()  # Hugging Face's layout has no file named checkpoint
    assert find_model_dir(size) == Path("models", size)


@pytest.mark.parametrize("name", ["", "nothing", "a\0b", "x" * 5000, "two\nlines", "../no", "~nobody/x"])
def test_an_unknown_model(tmp_path, name):
    make(tmp_path / "mine", whole=False)
    with pytest.raises(ModelDirError, match=r"known are shakespeare, 124M, 355M, 774M, 1558M, mine$"):
        find_model_dir(name, tmp_path)
    with pytest.raises(ModelDirError, match=r"known are shakespeare, 124M, 355M, 774M, 1558M$") as error:
        find_model_dir(name, tmp_path / "nowhere")
    assert "\n" not in str(error.value) and str(tmp_path / "nowhere") in str(error.value)


@pytest.mark.parametrize(
    "name, cure",
    [
        ("124m", "did you mean 124M?"),
        ("1558", "did you mean 1558M?"),
        ("shakespear", "did you mean shakespeare?"),
        ("gpt2-xl", "it is called 1558M here"),
        ("117M", "it is called 124M here"),
    ],
)
def test_a_name_that_is_nearly_right(name, cure):
    with pytest.raises(ModelDirError) as error:
        find_model_dir(name)
    assert cure in str(error.value)


def test_a_path_is_never_joined_to_another_directory(tmp_path, monkeypatch):
    """`--model_size .` and `../x` are what they are in the working directory, whatever `models` holds."""
    for place in ("models/here", "here", "lookalike"):
        make(tmp_path / place / "x")
    monkeypatch.chdir(tmp_path / "here")
    assert find_model_dir(".", tmp_path / "models") == Path()
    assert find_model_dir("../lookalike", tmp_path / "models") == Path("../lookalike")
    assert find_model_dir("..", tmp_path / "models") == Path("..")
    assert find_model_dir("./x") == Path("x")
    with pytest.raises(ModelDirError):
        find_model_dir("here/x", tmp_path / "models")


def test_the_embedded_model_and_paths(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    monkeypatch.setattr("picogpt.model_dirs.__file__", str(checkout / "picogpt" / "model_dirs.py"))
    with pytest.raises(ModelDirError, match="no model 'shakespeare'"):
        find_model_dir("shakespeare")
    # Each comes before those above it. A folder that happens to be here cannot hide the package's own model.
    for place in (Path(), checkout / "models", checkout / "picogpt" / "models", Path("models")):
        (place / "shakespeare").mkdir(parents=True)
        assert find_model_dir("shakespeare") == place / "shakespeare"
    make(Path("124M"))
    assert find_model_dir("124M") == Path("124M")
    make(Path("models/124M"))
    assert find_model_dir("124M") == Path("models/124M")
    assert find_model_dir(str(tmp_path / "124M")) == tmp_path / "124M"
