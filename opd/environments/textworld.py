"""Games of TextWorld: rooms, things and a quest, made from a seed and played in words."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from opd.environments.base import Start, Turn
from opd.environments.text import TextEnvironment, TextWorld
from opd.errors import ModelError, first_line
from opd.language.calls import Reply
from opd.prompts.messages import Messages

TASK = "quest"
AFTERWARDS = "Would you like to RESTART"


class TextWorldEnvironment(TextEnvironment):
    """A game of `textworld` of each start's seed. The reply's first line is the command, success is that the quest is
    won, and a quest that can no longer be won is over.

    Source: Cote et al. 2018, arXiv 1806.11532.
    """

    kind: Literal["textworld"] = "textworld"
    expert: ClassVar[bool] = True
    repeats: ClassVar[bool | None] = True
    rooms: int = Field(2, ge=1, le=50, description="Of the map")
    objects: int = Field(4, ge=1, le=100, description="Things in it")
    quest: int = Field(2, ge=1, le=30, description="Commands that the shortest way to win takes")
    hints: bool = Field(True, description="Name the commands that can be given, after each answer")

    def tasks(self) -> Mapping[str, str]:
        return {TASK: "win the quest of a small text game"}

    def build(self) -> GameWorld:
        try:
            import textworld  # noqa: F401
        except ImportError as error:
            raise ModelError(
                f"environment 'textworld' cannot be had ({first_line(error)}): pip install 'opd[textworld]'"
            ) from None
        return GameWorld(self)


class GameWorld(TextWorld):
    """The built environment. A game that was made is kept as long as the world is, by its seed."""

    def __init__(self, settings: TextWorldEnvironment):
        self.settings = settings
        self.folder = Path(tempfile.mkdtemp(prefix="opd-textworld-"))
        self.game: Any = None

    def reset(self, start: Start) -> Turn[Messages]:
        import textworld

        self._leave()
        wanted = ("admissible_commands", "policy_commands", "won", "lost", "objective", "description")
        infos = textworld.EnvInfos(**dict.fromkeys(wanted, True))
        path = str(self._made(start.seed))
        with warnings.catch_warnings():
            # The player below does not know the game's score, which is counted above it.
            warnings.simplefilter("ignore")
            self.game = textworld.start(path, request_infos=infos)
            self.state = self.game.reset()
        told = f"You play a text game. {_clean(self.state['objective'])}\n\n{_clean(self.state['description'])}"
        return Turn([{"role": "user", "content": f"{told}\n\n{self._hints()}Answer with one command."}])

    def step(self, action: Reply) -> Turn[Messages]:
        command = (action.text.splitlines() or [""])[0].strip()[:200] or "look"
        self.state, _, over = self.game.step(command)
        won = bool(self.state["won"])
        done = won or bool(self.state["lost"]) or bool(over)
        said = f"{_clean(self.state.feedback)}\n\n{'' if done else self._hints()}".strip()
        return Turn([{"role": "user", "content": said}], float(won), done)

    def expert(self) -> Reply:
        return Reply(str(self.state["policy_commands"][0]))

    def close(self) -> None:
        self._leave()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _leave(self) -> None:
        if self.game is not None:
            self.game.close()
            self.game = None

    def _hints(self) -> str:
        if not self.settings.hints:
            return ""
        return f"You can: {', '.join(sorted(self.state['admissible_commands']))}.\n"

    def _made(self, seed: int) -> Path:
        """The game of a seed, as a file that the package plays.

        Raises:
            ModelError: it makes none with these sizes.
        """
        import textworld

        path = self.folder / f"{seed}.z8"
        if not path.exists():
            options = textworld.GameOptions()
            options.nb_rooms, options.nb_objects = self.settings.rooms, self.settings.objects
            options.quest_length, options.seeds, options.path = self.settings.quest, seed, str(path)
            try:
                textworld.make(options)
            except Exception as error:  # whatever the generator raises
                sizes = f"rooms={options.nb_rooms}, objects={options.nb_objects}, quest={options.quest_length}"
                raise ModelError(
                    f"textworld makes no game with {sizes} ({first_line(error)}); take more rooms and objects, or a "
                    "shorter quest"
                ) from None
        return path


def _clean(text: object) -> str:
    """What a game says, without its banner, its prompt, the line behind that, and what it offers when it is over."""
    lines = [line.strip() for line in str(text).split("\n>")[0].splitlines()]
    kept = [line for line in lines if line and not line.startswith(AFTERWARDS) and not set(line) <= set("$\\/_| >-=*")]
    return " ".join(kept)
