"""``flask revoke-sessions``: whom it asks, what it ends, what it exits with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from apps import Site, Sites, command_runner
from database_servers import new_table_name
from servers import MemcachedPool


@pytest.fixture
def site(sites: Sites) -> Site:
    """One application with the defaults."""
    return sites()


def login(site: Site, user: object) -> FlaskClient:
    """A browser in which this user has logged in."""
    browser = site.browser_with(None)
    site.set(browser, _user_id=user)
    return browser


def run(site: Site, *args: str, **options: Any) -> Any:
    """The command."""
    return command_runner(site.app).invoke(args=["revoke-sessions", *args], **options)


def test_one_user(site: Site) -> None:
    """--user ends theirs and nobody else's; 0 where every place was told."""
    alice, bob = login(site, "alice"), login(site, "bob")
    result = run(site, "--user", "alice", "--yes")
    assert (result.exit_code, result.output) == (0, "Ended 1 sessions.\n")
    assert site.data(alice) == {}
    assert site.data(bob) == {"_user_id": "bob"}


def test_everybody(site: Site) -> None:
    """--all ends everything that has a row, visitors' sessions too."""
    browsers = [login(site, name) for name in ("alice", "bob")]
    visitor = site.browser_with(None)
    site.set(visitor, a=1)
    site.data(visitor)
    result = run(site, "--all", "--yes")
    assert (result.exit_code, result.output) == (0, "Ended 3 sessions.\n")
    assert [site.data(browser) for browser in [*browsers, visitor]] == [{}] * 3


@pytest.mark.parametrize("args", [[], ["--user", "alice", "--all"]])
def test_whom_must_be_said_once(site: Site, args: list[str]) -> None:
    """Neither or both is a mistake, and ends nothing."""
    browser = login(site, "alice")
    result = run(site, *args, "--yes")
    assert result.exit_code == 2
    assert "--user ID or --all" in result.stderr
    assert site.data(browser) == {"_user_id": "alice"}


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_no_is_the_default_answer(site: Site, answer: str) -> None:
    """Without --yes it says how many and asks; without a yes nothing ends."""
    browser = login(site, "alice")
    result = run(site, "--user", "alice", input=answer)
    assert result.exit_code == 1
    assert "End 1 sessions of user alice?" in result.output
    assert site.data(browser) == {"_user_id": "alice"}


def test_yes_is_asked_for(site: Site) -> None:
    """A yes at the prompt ends them."""
    browser = login(site, "alice")
    result = run(site, "--all", input="y\n")
    assert result.exit_code == 0
    assert "End 1 sessions of everybody?" in result.output
    assert site.data(browser) == {}


def test_an_unknown_user_has_no_sessions(site: Site) -> None:
    """Nothing to end is no failure."""
    result = run(site, "--user", "nobody", "--yes")
    assert (result.exit_code, result.output) == (0, "Ended 0 sessions.\n")


@pytest.mark.parametrize("args", [["--yes"], []])
def test_sql_down_is_1(
    site: Site, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is ended without SQL, and the operator sees what it said."""
    browser = login(site, "alice")
    with monkeypatch.context() as broken:
        site.break_sql(broken)
        result = run(site, "--user", "alice", *args)
    assert result.exit_code == 1
    assert "the database is away" in result.stderr
    assert site.data(browser) == {"_user_id": "alice"}


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_a_home_that_could_not_be_told_is_3(sites: Sites, fault: str) -> None:
    """SQL has it and the other home too: said, counted, and gone for everybody."""
    site = sites(RESILIENT_SESSION_NODE_TIMEOUT=0.3)
    browser = login(site, "alice")
    getattr(site.nodes[0], fault)()
    result = run(site, "--user", "alice", "--yes")
    assert result.exit_code == 3
    assert "Ended 1 sessions." in result.stdout
    assert "Of 1 of them a node could not be told" in result.stderr
    assert site.data(browser) == {}


def test_a_host_without_the_nodes_is_4(
    site: Site, memcached_pool: MemcachedPool, tmp_path: Path
) -> None:
    """Rows name nodes that this host does not know: ended in SQL, and said."""
    login(site, "alice")
    with memcached_pool.lend(2) as others, Sites(others, tmp_path) as elsewhere:
        result = run(elsewhere(), "--user", "alice", "--yes")
    assert result.exit_code == 4
    assert "Ended 1 sessions." in result.stdout
    assert "1 of them name nodes that are not configured on this host" in result.stderr
    assert all(row.revoked_at for row in site.rows().values())


def test_a_second_run_finds_nothing(site: Site) -> None:
    """Repeating the command is harmless."""
    login(site, "alice")
    assert run(site, "--all", "--yes").exit_code == 0
    result = run(site, "--all", "--yes")
    assert (result.exit_code, result.output) == (0, "Ended 0 sessions.\n")


#: Ids that some collation, driver or column would take for another or refuse.
ODD = [
    "bob",
    "Bob",
    "bob ",
    "\u00e9",
    "e\u0301",
    "e",
    "",
    "0",
    "00",
    "nul\0l",
    "\ud800",
]


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_every_database_tells_users_apart(
    sites: Sites, database: str, request: pytest.FixtureRequest
) -> None:
    """Case, blanks, accents and odd characters count on each server as on SQLite."""
    server = request.getfixturevalue(database)
    site = sites(
        SQLALCHEMY_DATABASE_URI=server.uri, RESILIENT_SESSION_TABLE=new_table_name()
    )
    browsers = {user: login(site, user) for user in [*ODD, "x" * 300, "x" * 301]}
    for user, browser in browsers.items():
        with site.app.app_context():
            assert site.sessions.revoke_user(user) == 1
        assert site.data(browser) == {}
