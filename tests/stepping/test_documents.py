"""docs/stepping.md is run as it stands."""

import re
from pathlib import Path

from tests.stepping.support import hosting

TEXT = (Path(__file__).parents[2] / "docs/stepping.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def block(word):
    (found,) = [code for code in BLOCKS if word in code]
    return found


def run(code):
    exec(compile(code, "docs/stepping.md", "exec"), {})


def test_clients_of_the_document_step_what_is_hosted():
    with hosting("CartPole-v1") as host:
        for word in ("env = RemoteEnv(", "envs = RemoteVectorEnv("):
            code = block(word)
            assert "localhost:9901" in code
            run(code.replace("localhost:9901", host.address))
        assert host.open_envs == 0


def test_server_of_the_document_serves(capsys):
    run(
        block("with EnvServer(")
        .replace("port=9901", "port=0")
        .replace("server.wait()", "server.wait(0.0)")
    )
    assert re.fullmatch(r"127\.0\.0\.1:\d+\n", capsys.readouterr().out)
