"""`minisft chat`: talk to a model, or ask it one question."""

import argparse
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from minisft.commands.numbers import natural, positive
from minisft.data.conversation import Turn
from minisft.errors import EXIT_INTERRUPTED, PATH, UserError, printable

HELP = """  /reset         begin a new conversation
  /system TEXT   begin a new conversation with this system text; without TEXT, with none
  /help          this list
  /quit          end, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with a space is never a command."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `minisft chat`."""
    command = commands.add_parser("chat", help="talk to a model, or ask it one question", allow_abbrev=False,
                                  usage="minisft chat MODEL [--prompt TEXT] [options]")
    command.add_argument("model", metavar="MODEL", help="Hugging Face folder, such as runs/my/final")
    command.add_argument("--prompt", metavar="TEXT", help="answer this and end; - reads it from standard input")
    command.add_argument("--system", default="", metavar="TEXT", help="system text of the conversation")
    command.add_argument("--template", default="", metavar="NAME", help="chat template (the one the folder tells)")
    command.add_argument("--templates", default="", metavar="FILE", help="TOML file with templates of your own")
    command.add_argument("--temperature", type=float, default=0.0, metavar="T",
                         help="0: always the most probable token (0)")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P",
                         help="draw from the fewest tokens that together are as likely as P (1: all)")
    command.add_argument("--top-k", type=natural, default=0, metavar="K",
                         help="draw from the K likeliest tokens (0: all)")
    command.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R",
                         help="above 1: tokens that were there before become less likely (1)")
    command.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="tokens of an answer (512)")
    command.add_argument("--seed", type=natural, default=0, help="of what is drawn (0)")
    command.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                         help="of the weights; auto: bf16 on a GPU and on a CPU that multiplies in it (auto)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Talk until the user ends it, or answer --prompt."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ş shows a question mark
    try:
        if options.prompt is None:
            converse(Chat(options))
        else:
            Chat(options).ask(given(options.prompt))
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


def given(prompt: str) -> str:
    """The text of --prompt."""
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").removesuffix("\n")
    if not prompt.strip():
        raise UserError("--prompt: it is empty; give a question, or leave --prompt out to talk")
    return prompt


@dataclass
class Chat:
    """A conversation with a model, and how the model answers."""

    options: argparse.Namespace
    system: str = ""
    turns: list[Turn] = field(default_factory=list)  # of user and assistant

    def __post_init__(self) -> None:
        import torch  # imported late: `minisft --help` should not wait for it

        from minisft.cpu.kernels import CPU_MATMULS_IN_BF16
        from minisft.evaluation.assistant import Assistant
        from minisft.evaluation.sampling import Sampling
        from minisft.model.llama import DTYPES

        options, device = self.options, "cuda" if torch.cuda.is_available() else "cpu"
        self.sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
                                 repetition_penalty=options.repetition_penalty, seed=options.seed)
        fast = "bf16" if device == "cuda" or CPU_MATMULS_IN_BF16 else "fp32"
        precision = fast if options.precision == "auto" else options.precision
        self.assistant = Assistant.load(options.model, template=options.template, templates=options.templates,
                                        dtype=DTYPES[precision], device=device)
        self.system = options.system

    def ask(self, text: str) -> None:
        """Print the answer as it comes to be. Raises UserError where there is none, and forgets the question then."""
        try:
            (self.system + text).encode()
        except UnicodeEncodeError:
            raise UserError("the text is not UTF-8") from None
        turns = (*([Turn("system", self.system)] if self.system else []), *self.turns, Turn("user", text))
        tokens: list[int] = []
        said = ""
        try:
            for piece in self.assistant.renderer.tokenizer.decode_stream(self._answer(turns, tokens)):
                print(harmless(piece) if sys.stdout.isatty() else piece, end="", flush=True)
                said += piece
            print(flush=True)
        finally:
            if said:  # all of it, or what Ctrl-C left
                self.turns += [Turn("user", text), Turn("assistant", said)]
        self._say_what_was_cut(len(self.assistant.renderer.prompt(turns)) + len(tokens), len(tokens))

    def _answer(self, turns: tuple[Turn, ...], tokens: list[int]) -> Iterator[int]:
        for token in self.assistant.tokens(turns, max_new_tokens=self.options.max_new_tokens, sampling=self.sampling):
            tokens.append(token)
            yield token

    def _say_what_was_cut(self, length: int, answered: int) -> None:
        context = self.assistant.model.config.max_position_embeddings
        if length >= context:
            print(f"(cut: the model's context of {context:,} tokens is full; /reset begins anew)", file=sys.stderr)
        elif answered == self.options.max_new_tokens:
            print(f"(cut after {answered:,} tokens; --max-new-tokens allows more)", file=sys.stderr)


def converse(chat: Chat) -> None:
    """Read a line, answer it, until the user ends."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{printable(chat.assistant.name)}: /help lists the commands, Ctrl-D ends")
    with history() if terminal else nullcontext():
        while True:
            try:
                line = input("> " if terminal else "")
            except EOFError:
                print(end="\n" if terminal else "")
                return
            except KeyboardInterrupt:  # leaves the line
                print()
                continue
            command, _, argument = line.partition(" ")
            if command == "/quit":
                return
            try:
                respond(chat, line, command, argument.strip())
            except KeyboardInterrupt:
                print(" (stopped)")
            except UserError as error:
                print(f"error: {printable(error, PATH)}; /reset begins anew", file=sys.stderr)


def respond(chat: Chat, line: str, command: str, argument: str) -> None:
    """What one line asks for: a command, or an answer."""
    if command == "/help":
        print(HELP)
    elif command in ("/reset", "/system"):
        chat.turns.clear()
        if command == "/system":
            chat.system = argument
    elif command.startswith("/"):
        print(f"error: {printable(command)}: no such command; /help lists them", file=sys.stderr)
    elif line.strip():
        chat.ask(line.strip())


@contextmanager
def history() -> Iterator[None]:
    """Lines typed before can be had back with the arrow keys, in later conversations too."""
    try:
        import readline
    except ImportError:  # Python built without it
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    file = (state if state.is_absolute() else Path.home() / ".local/state") / "minisft" / "history"
    readline.set_history_length(1000)
    with suppress(OSError):  # there is none yet
        readline.read_history_file(file)
    try:
        yield
    finally:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
            file.chmod(0o600)
        except OSError as error:
            print(f"{printable(file, PATH)}: the history is not kept: {error.strerror}", file=sys.stderr)


def harmless(text: str) -> str:
    """`text` without the characters that would steer the terminal: each shows as its number."""
    return "".join(f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
