"""Settings: which source wins, what a wrong one says, and that all of them are documented."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orchestrator.config import Config, Layer, default_data_dir, flatten, load_config, merge, settings
from orchestrator.errors import ConfigError

ROOT = Path(__file__).parent.parent


def load(
    folder: Path,
    *,
    yaml: str | None = None,
    dotenv: str | None = None,
    environ: dict[str, str] | None = None,
    **overrides: Any,
) -> Config:
    """The settings of a project at ``folder`` with these sources; overrides have ``__`` for dots."""
    if yaml is not None:
        (folder / "orchestrator.yaml").write_text(yaml)
    if dotenv is not None:
        (folder / ".env").write_text(dotenv)
    given = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(project_dir=folder, environ=environ or {}, overrides=given)


def refused(folder: Path, **sources: Any) -> str:
    """What is said about these sources."""
    with pytest.raises(ConfigError) as caught:
        load(folder, **sources)
    assert caught.value.exit_code == 2
    return caught.value.message


# -- order --------------------------------------------------------------------------------------------------


def test_each_source_wins_over_the_ones_before_it(tmp_path: Path) -> None:
    """Five settings, each set in one source more: the last source that sets one decides it."""
    config = load(
        tmp_path,
        yaml="limits: {max_depth: 11, max_processes: 11, max_turns: 11, max_prompt_bytes: 11}",
        dotenv="ORCHESTRATOR_LIMITS__MAX_PROCESSES=12\nORCHESTRATOR_LIMITS__MAX_TURNS=12\n"
        "ORCHESTRATOR_LIMITS__MAX_PROMPT_BYTES=12\n",
        environ={"ORCHESTRATOR_LIMITS__MAX_TURNS": "13", "ORCHESTRATOR_LIMITS__MAX_PROMPT_BYTES": "13"},
        limits__max_prompt_bytes=14,
    )
    limits = config.limits
    assert (limits.timeout_s, limits.max_depth, limits.max_processes) == (3600, 11, 12)
    assert (limits.max_turns, limits.max_prompt_bytes) == (13, 14)
    assert config.origin == {
        "limits.max_depth": str(tmp_path / "orchestrator.yaml"),
        "limits.max_processes": str(tmp_path / ".env"),
        "limits.max_turns": "environment",
        "limits.max_prompt_bytes": "command line",
    }


def test_defaults_alone_have_no_origin(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.origin == {}
    assert config.limits.budget_usd is None
    assert config.agents.paths == (Path("agents"),)
    assert config.project_dir == tmp_path


def test_two_configs_do_not_share_origins(tmp_path: Path) -> None:
    first = load(tmp_path, limits__max_depth=2)
    second = load(tmp_path, limits__max_turns=2)
    assert set(first.origin) == {"limits.max_depth"}
    assert set(second.origin) == {"limits.max_turns"}


def test_null_takes_a_setting_back(tmp_path: Path) -> None:
    config = load(tmp_path, yaml="limits: {budget_usd: 5}", environ={"ORCHESTRATOR_LIMITS__BUDGET_USD": "null"})
    assert config.limits.budget_usd is None


def test_zero_is_a_value(tmp_path: Path) -> None:
    assert load(tmp_path, yaml="limits: {budget_usd: 0}").limits.budget_usd == 0


def test_an_empty_variable_is_not_set(tmp_path: Path) -> None:
    config = load(tmp_path, yaml="log: {level: INFO}", environ={"ORCHESTRATOR_LOG__LEVEL": " "})
    assert config.log.level == "INFO"


def test_dotted_names_and_nested_ones_are_the_same(tmp_path: Path) -> None:
    config = load(tmp_path, yaml="limits.max_depth: 2\nclaude:\n  env.A: '1'\nlog: {level: debug}")
    assert config.limits.max_depth == 2
    assert config.claude.env == {"A": "1"}
    assert config.log.level == "debug"


def test_lists_work_in_every_source(tmp_path: Path) -> None:
    everywhere: list[dict[str, Any]] = [
        {"yaml": "agents: {paths: [a, b]}"},
        {"dotenv": "ORCHESTRATOR_AGENTS__PATHS='[a, b]'"},
        {"environ": {"ORCHESTRATOR_AGENTS__PATHS": "[a, b]"}},
        {"agents__paths": ["a", "b"]},
    ]
    for sources in everywhere:
        config = load(tmp_path, **sources)
        assert config.agents.paths == (Path("a"), Path("b"))


@pytest.mark.parametrize("text", ["/data/a: b", "#1", "010", "1e3", "yes", "@x", "*x", "{a}", "2026-01-01", "a b"])
def test_text_and_paths_are_taken_as_they_stand(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, environ={"ORCHESTRATOR_STORE__PATH": text, "ORCHESTRATOR_AGENTS__DEFAULT_MODEL": text})
    assert config.store.path == Path(text)
    assert config.agents.default_model == text


# -- claude.env ---------------------------------------------------------------------------------------------


def test_variables_for_the_cli_keep_name_and_text(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        yaml="claude: {env: {FROM_YAML: 8000, Shared: yaml}}",
        environ={
            "ORCHESTRATOR_CLAUDE__ENV__Shared": "007",
            "ORCHESTRATOR_CLAUDE__ENV__A__B": "yes",
            "ORCHESTRATOR_CLAUDE__ENV__EMPTY": "",
        },
        claude__env__LAST="x: y",
    )
    assert config.claude.env == {"FROM_YAML": "8000", "Shared": "007", "A__B": "yes", "EMPTY": "", "LAST": "x: y"}
    assert config.origin["claude.env.Shared"] == "environment"


def test_a_later_claude_env_replaces_an_earlier_one(tmp_path: Path) -> None:
    """What the offline model relies on: no variable of the project may lead a CLI elsewhere."""
    only = {"ANTHROPIC_API_KEY": "offline"}
    config = load(
        tmp_path,
        yaml="claude: {env: {ANTHROPIC_BASE_URL: 'https://example.org'}}",
        dotenv="ORCHESTRATOR_CLAUDE__ENV__CLAUDE_CODE_USE_BEDROCK=1",
        environ={"ORCHESTRATOR_CLAUDE__ENV__ANTHROPIC_AUTH_TOKEN": "t"},
        claude__env=only,
    )
    assert config.claude.env == only
    assert [name for name in config.origin if name.startswith("claude.env")] == ["claude.env"]


def test_a_callers_overrides_are_not_changed(tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"claude.env": {"A": "1"}, "claude.env.B": "2"}
    config = load_config(project_dir=tmp_path, environ={}, overrides=overrides)
    assert config.claude.env == {"A": "1", "B": "2"}
    assert overrides == {"claude.env": {"A": "1"}, "claude.env.B": "2"}


# -- what is wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "origin"),
    [
        ({"yaml": "limits: {max_dept: 2}"}, "orchestrator.yaml"),
        ({"dotenv": "ORCHESTRATOR_LIMITS__MAX_DEPT=2"}, ".env"),
        ({"environ": {"ORCHESTRATOR_LIMITS__MAX_DEPT": "2"}}, "environment"),
        ({"limits__max_dept": 2}, "command line"),
    ],
)
def test_an_unknown_setting_is_named_with_its_source_and_a_near_one(
    tmp_path: Path, sources: dict[str, Any], origin: str
) -> None:
    message = refused(tmp_path, **sources)
    assert message.startswith("unknown setting 'limits.max_dept'")
    assert re.search(rf"\(.*{re.escape(origin)}\)", message)
    assert message.endswith("did you mean 'limits.max_depth'?")


def test_an_unknown_setting_far_from_all_gets_no_guess(tmp_path: Path) -> None:
    assert refused(tmp_path, yaml="qqqq: 1").endswith(f"({tmp_path / 'orchestrator.yaml'})")


@pytest.mark.parametrize(
    ("sources", "origin"),
    [
        ({"yaml": "limits: {max_depth: deep}"}, "orchestrator.yaml"),
        ({"dotenv": "ORCHESTRATOR_LIMITS__MAX_DEPTH=deep"}, ".env"),
        ({"environ": {"ORCHESTRATOR_LIMITS__MAX_DEPTH": "deep"}}, "environment"),
        ({"limits__max_depth": "deep"}, "command line"),
    ],
)
def test_a_wrong_value_is_named_with_its_source(tmp_path: Path, sources: dict[str, Any], origin: str) -> None:
    message = refused(tmp_path, **sources)
    assert message.startswith("limits.max_depth: ")
    assert 'got "deep"' in message
    assert re.search(rf"\(.*{re.escape(origin)}\)$", message)


def test_every_wrong_setting_is_told_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, yaml="limits: {max_depth: 0, timeout_s: -1}\nagents: {paths: [agents, 7]}")
    assert [part.split(":")[0] for part in message.split("; ")] == [
        "limits.max_depth", "limits.timeout_s", "agents.paths",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("yaml", "name"),
    [
        ("limits: {budget_usd: .nan}", "limits.budget_usd"),
        ("limits: {budget_usd: -0.01}", "limits.budget_usd"),
        ("limits: {max_processes: 0}", "limits.max_processes"),
        ("server: {port: 65536}", "server.port"),
        ("log: {level: LOUD}", "log.level"),
        ("log: {format: xml}", "log.format"),
        ("claude: {pass_env: HOME}", "claude.pass_env"),
        ("claude: {env: [A]}", "claude.env"),
        ("claude: {env: {A: {b: 1}}}", "claude.env"),
        ("claude: {env: [A]}\nclaude.env.B: '1'", "claude.env"),
        ("agents: {default_model: [opus]}", "agents.default_model"),
    ],
)
def test_values_that_make_no_sense_are_refused(tmp_path: Path, yaml: str, name: str) -> None:
    assert refused(tmp_path, yaml=yaml).startswith(f"{name}: ")


def test_a_value_for_a_whole_section_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, yaml="limits: 3").startswith("'limits' is a section of settings")
    (tmp_path / "orchestrator.yaml").unlink()
    assert "(environment)" in refused(tmp_path, environ={"ORCHESTRATOR_LIMITS": "3"})


def test_a_wrong_variable_for_the_cli_is_not_printed(tmp_path: Path) -> None:
    message = refused(tmp_path, yaml="claude: {env: {ANTHROPIC_API_KEY: [sk-ant-abcdefgh]}}")
    assert "sk-ant" not in message
    assert "claude.env" in message


# -- files --------------------------------------------------------------------------------------------------


def test_the_file_of_a_parent_directory_is_found_and_is_the_project(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("ORCHESTRATOR_LIMITS__MAX_TURNS=4")
    (tmp_path / "orchestrator.yaml").write_text("store: {path: state/runs.db}\nlimits: {max_depth: 2}")
    deep = tmp_path / "src" / "deep"
    deep.mkdir(parents=True)
    (deep / ".env").write_text("ORCHESTRATOR_LIMITS__MAX_TURNS=9")
    config = load(deep)
    assert config.project_dir == tmp_path
    assert (config.limits.max_depth, config.limits.max_turns) == (2, 4)
    assert config.store_path == tmp_path / "state" / "runs.db"


def test_the_nearest_file_wins_alone(tmp_path: Path) -> None:
    (tmp_path / "orchestrator.yaml").write_text("limits: {max_depth: 2, max_turns: 2}")
    near = tmp_path / "near"
    near.mkdir()
    config = load(near, yaml="limits: {max_depth: 1}")
    assert (config.limits.max_depth, config.limits.max_turns) == (1, None)


def test_orchestrator_config_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "orchestrator.yaml").write_text("limits: {max_depth: 2}")
    other = tmp_path / "elsewhere" / "mine.yaml"
    other.parent.mkdir()
    other.write_text("limits: {max_depth: 7}")
    config = load(tmp_path, environ={"ORCHESTRATOR_CONFIG": str(other)})
    assert config.limits.max_depth == 7
    assert config.project_dir == other.parent
    assert config.origin == {"limits.max_depth": str(other)}
    argument = load_config(tmp_path / "orchestrator.yaml", environ={"ORCHESTRATOR_CONFIG": str(other)})
    assert argument.limits.max_depth == 2, "an argument comes before the environment"


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert str(missing) in refused(tmp_path, environ={"ORCHESTRATOR_CONFIG": str(missing)})
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(missing, environ={})


@pytest.mark.parametrize(
    "yaml", ["", "\n# nothing yet\n", "---\n", "limits:\n  # max_depth: 2\nclaude:\n", "{}", "\ufeff"]
)
def test_an_empty_file_or_section_sets_nothing(tmp_path: Path, yaml: str) -> None:
    assert load(tmp_path, yaml=yaml).origin == {}


@pytest.mark.parametrize("yaml", ["a: [1", "\ta: 1", "a: 1\n b: 2", "limits: *nothing"])
def test_bad_yaml_is_told_with_file_and_line(tmp_path: Path, yaml: str) -> None:
    message = refused(tmp_path, yaml=yaml)
    assert str(tmp_path / "orchestrator.yaml") in message
    assert "line" in message


def test_a_file_that_is_not_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "orchestrator.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "orchestrator.yaml" in refused(tmp_path)
    (tmp_path / "orchestrator.yaml").unlink()
    (tmp_path / ".env").write_bytes(b"ORCHESTRATOR_LOG__LEVEL=\xff")
    assert str(tmp_path / ".env") in refused(tmp_path)


@pytest.mark.parametrize("yaml", ["[1, 2]", "text", "3"])
def test_a_file_must_be_a_mapping(tmp_path: Path, yaml: str) -> None:
    assert "must be a mapping" in refused(tmp_path, yaml=yaml)


def test_relative_paths_start_at_the_project(tmp_path: Path) -> None:
    config = load(tmp_path, yaml="data_dir: state\nagents: {paths: [a, /b]}")
    assert config.data_path == tmp_path / "state"
    assert config.store_path == tmp_path / "state" / "runs.db"
    assert [config.resolve(path) for path in config.agents.paths] == [tmp_path / "a", Path("/b")]
    assert config.resolve(Path("~/x")) == Path.home() / "x"
    assert config.resolve(Path("../x")) == tmp_path.parent / "x"


def test_a_relative_project_directory_starts_at_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, yaml="project_dir: sub\ndata_dir: state")
    assert config.project_dir == tmp_path / "sub"
    assert config.data_path == tmp_path / "sub" / "state"


# -- the data directory that nobody named -------------------------------------------------------------------


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data directory of all projects without settings of their own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "orchestrator"


def test_projects_without_settings_share_the_default_data_directory(tmp_path: Path, shared: Path) -> None:
    assert load(tmp_path).data_path == shared
    assert load(tmp_path, environ={"ORCHESTRATOR_LIMITS__MAX_DEPTH": "2"}).data_path == shared


def test_each_settings_file_has_a_default_data_directory_of_its_own(tmp_path: Path, shared: Path) -> None:
    app = tmp_path / "app"
    (app / "src").mkdir(parents=True)
    (tmp_path / "link").symlink_to(app)
    file = app / "orchestrator.yaml"
    config = load(app, yaml="limits: {max_depth: 2}", dotenv="ORCHESTRATOR_LIMITS__MAX_TURNS=3")
    digest = hashlib.sha256(bytes(file)).hexdigest()
    assert config.data_path == shared / "projects" / f"app-{digest[:8]}"
    assert config.store_path == config.data_path / "runs.db"
    for again in (
        load(app / "src"),
        load(tmp_path / "link"),
        load(tmp_path, environ={"ORCHESTRATOR_CONFIG": str(file)}),
        load_config(file, environ={}),
        load_config(tmp_path / "link" / "orchestrator.yaml", environ={}),
        load(app, environ={"ORCHESTRATOR_PROJECT_DIR": str(tmp_path)}),
    ):
        assert again.data_path == config.data_path


def test_a_settings_file_at_the_root_has_a_name_too(shared: Path) -> None:
    path = default_data_dir(Path("/orchestrator.yaml"))
    assert path.parent == shared / "projects"
    assert re.fullmatch("root-[0-9a-f]{8}", path.name)


def test_a_data_directory_that_is_set_is_the_one(tmp_path: Path) -> None:
    config = load(tmp_path, yaml="data_dir: state")
    assert (config.data_path, config.origin["data_dir"]) == (
        tmp_path / "state",
        str(tmp_path / "orchestrator.yaml"),
    )
    assert load(tmp_path, environ={"ORCHESTRATOR_DATA_DIR": "nearest"}).data_path == tmp_path / "nearest"


def test_null_takes_the_data_directory_back(tmp_path: Path, shared: Path) -> None:
    config = load(tmp_path, yaml="data_dir: ~")
    assert config.data_path.parent == shared / "projects"
    assert "data_dir" not in config.origin, "it is the default"


def test_the_default_data_directory_is_shown_as_a_default(tmp_path: Path) -> None:
    (tmp_path / "orchestrator.yaml").write_text("limits: {max_depth: 2}")
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "config", "show", "--origin", "--json"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    shown = json.loads(done.stdout)["data_dir"]
    assert shown["origin"] == "default"
    assert Path(shown["value"]).name.startswith(f"{tmp_path.name}-")


# -- what is not read ---------------------------------------------------------------------------------------


def test_nothing_else_of_env_file_or_environment_is_read(tmp_path: Path) -> None:
    secret = "sk-ant-not-for-us"
    config = load(
        tmp_path,
        dotenv=f"ANTHROPIC_API_KEY={secret}\nLIMITS__MAX_DEPTH=9\nOTHER={secret}\n"
        "ORCHESTRATOR_CLAUDE__ENV__NAMED=${OTHER}\nORCHESTRATOR_NO_VALUE\n",
        environ={
            "ANTHROPIC_API_KEY": secret,
            "limits__max_depth": "9",
            "orchestrator_limits__max_depth": "9",
            "PATH": "/bin",
            "ORCHESTRATOR_RUN_ID": "a" * 16,
            "ORCHESTRATOR_RUN_TOKEN": secret,
            "ORCHESTRATOR_INSTANCE_ID": "x",
        },
    )
    assert secret not in config.model_dump_json()
    assert config.claude.env == {"NAMED": "${OTHER}"}
    assert set(config.origin) == {"claude.env.NAMED"}


def test_the_process_environment_is_only_read_when_none_is_given(tmp_path: Path) -> None:
    code = (
        "import json; from pathlib import Path; from orchestrator.config import load_config\n"
        "print(json.dumps([load_config().limits.max_depth, load_config(environ={}).limits.max_depth,"
        " load_config(environ={}).claude.env]))"
    )
    (tmp_path / ".env").write_text("ORCHESTRATOR_CLAUDE__ENV__A=${SECRET_OF_MINE}")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "ORCHESTRATOR_LIMITS__MAX_DEPTH": "5", "SECRET_OF_MINE": "s", "HOME": "/"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [5, 3, {"A": "${SECRET_OF_MINE}"}]


# -- all settings -------------------------------------------------------------------------------------------


@given(values=st.dictionaries(st.sampled_from(sorted(settings())), st.integers(2, 60000), min_size=1))
@hypothesis_settings(max_examples=50, deadline=None)
def test_flatten_undoes_nesting(values: dict[str, int]) -> None:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, dot, leaf = name.rpartition(".")
        (tree.setdefault(section, {}) if dot else tree)[leaf] = value
    assert dict(flatten(tree)) == values


@given(
    layers=st.lists(
        st.dictionaries(st.sampled_from(["max_depth", "max_processes", "max_turns"]), st.integers(1, 99))
    )
)
@hypothesis_settings(max_examples=50, deadline=None)
def test_the_last_layer_that_sets_a_setting_decides(layers: list[dict[str, int]]) -> None:
    named = [
        Layer(f"layer {number}", {f"limits.{name}": value for name, value in layer.items()})
        for number, layer in enumerate(layers)
    ]
    config = merge(named, project_dir=Path("/"))
    for name in ("max_depth", "max_processes", "max_turns"):
        last = [number for number, layer in enumerate(layers) if name in layer]
        expected = layers[last[-1]][name] if last else getattr(Config().limits, name)
        assert getattr(config.limits, name) == expected
        assert config.origin.get(f"limits.{name}") == (f"layer {last[-1]}" if last else None)


def documented() -> dict[str, tuple[str, str]]:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z_.]+)` \| (.*?) \| (.+) \|$", text, re.MULTILINE)
    return {name: (default, meaning) for name, default, meaning in rows}


def as_documented(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def test_every_setting_is_documented_and_nothing_else() -> None:
    assert set(documented()) == set(settings())


@pytest.mark.parametrize("name", sorted(settings()))
def test_the_documented_default_is_the_default(name: str) -> None:
    default, meaning = documented()[name]
    field = settings()[name]
    assert len(meaning) > 10
    if field.default_factory is None:
        assert default == as_documented(field.default)
    elif name == "claude.env":
        assert default == "`{}`"
    else:
        assert "directory" in default, "it depends on the machine: the document says how"


@pytest.mark.parametrize("name", sorted(settings()))
def test_every_setting_can_be_given_in_the_environment(tmp_path: Path, name: str) -> None:
    value: Any = Config()
    for part in name.split("."):
        value = getattr(value, part)
    text = json.dumps(value if not isinstance(value, tuple) else list(value), default=str)
    text = text.strip('"') if text.startswith('"') else text
    variable = "ORCHESTRATOR_" + name.upper().replace(".", "__")
    config = load(tmp_path, environ={variable: text})
    given: Any = config
    for part in name.split("."):
        given = getattr(given, part)
    assert given == value
    assert config.origin == {name: "environment"}
