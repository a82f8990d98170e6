"""``policy-client host`` as a person, or a supervisor of processes, meets it."""

import re

from client_sdk import RemoteEnv
from tests.stepping.support import HostProcess


def test_it_says_where_it_hosts_and_what_and_writes_it_down(tmp_path):
    file = tmp_path / "address"
    with HostProcess("CartPole-v1", "--port", "0", "--address-file", str(file)) as host:
        assert re.fullmatch(r"hosting CartPole-v1 on 127\.0\.0\.1:\d+", host.line)
        assert file.read_text() == host.address
        with RemoteEnv(host.address) as env:
            env.reset(seed=1)
            assert env.step(0)[1] == 1.0
