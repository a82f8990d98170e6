"""What Ray writes while it starts, on a terminal and elsewhere."""

import io
import os
import sys

from rich.console import Console
from rich.live import Live

from policy_server.commands.ray_noise import quiet_start

HABITUAL = "(Runner pid=7) DeprecationWarning: `RLModule(config=[RLModuleConfig object])` has been deprecated, so\n"
WORTH_READING = "(Runner pid=7) the disk is nearly full\n"


def test_habitual_warnings_stay_out_of_a_file_and_others_get_in(capfd):
    with quiet_start():
        sys.stderr.write(HABITUAL + WORTH_READING)
        os.write(2, HABITUAL.encode())
    assert capfd.readouterr().err == WORTH_READING


def test_habitual_warnings_stay_off_the_live_panel_and_others_appear_above_it():
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=40)
    # The panel puts itself in the place of sys.stderr.
    with Live("the panel", console=console), quiet_start():
        sys.stderr.write(HABITUAL)
        sys.stderr.write(WORTH_READING)
    assert "deprecated" not in terminal.getvalue()
    assert "nearly full" in terminal.getvalue()


def test_what_one_line_sums_up_is_not_shown(capfd):
    with quiet_start() as noise:
        sys.stderr.write(WORTH_READING)
        noise.wanted = False
    assert capfd.readouterr().err == ""
