"""`minisft chat`: talk to a model, or ask it one question."""

import io
import os
import sys
import unicodedata
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import tee
from pathlib import Path

from minisft.cli.loading import load
from minisft.cpu import kernels
from minisft.data.conversation import Turn
from minisft.errors import EXIT_INTERRUPTED, PATH, UserError, printable
from minisft.generate.assistant import Sampling

HELP = """  /reset         begin a new conversation
  /system TEXT   begin a new conversation with this system text; without TEXT, with none
  /help          this list
  /quit          end, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with a space is never a command."""


def run(options: Namespace) -> None:
    """Talk until the user ends it, or answer --prompt."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ş shows a question mark
    try:
        chat, prompt = Chat(options), options.prompt
        if prompt is None:
            return converse(chat)
        if prompt == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").removesuffix("\n")
        if not prompt.strip():
            raise UserError("--prompt: it is empty; give a question, or leave --prompt out to talk")
        chat.ask(prompt)
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


class Chat:
    """A conversation with a model, and how the model answers."""

    def __init__(self, options: Namespace):
        self.max_new_tokens, self.system = options.max_new_tokens, options.system
        self.turns: list[Turn] = []  # of user and assistant
        self.sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
                                 repetition_penalty=options.repetition_penalty, seed=options.seed)
        self.assistant = load(options.model, options, bf16_on_cpu=kernels.CPU_MATMULS_IN_BF16)

    def ask(self, text: str) -> None:
        """Print the answer as it is generated. If it fails, raises UserError and forgets the question."""
        try:
            (self.system + text).encode()
        except UnicodeEncodeError:
            raise UserError("the text is not UTF-8; write it in UTF-8") from None
        turns = (*([Turn("system", self.system)] if self.system else []), *self.turns, Turn("user", text))
        tokens, counted = tee(self.assistant.tokens(turns, max_new_tokens=self.max_new_tokens, sampling=self.sampling))
        answer = ""
        try:
            for piece in self.assistant.renderer.tokenizer.decode_stream(tokens):
                print(harmless(piece) if sys.stdout.isatty() else piece, end="", flush=True)
                answer += piece
            print(flush=True)
        finally:
            if answer:  # all of it, or as much as Ctrl-C left
                self.turns += [Turn("user", text), Turn("assistant", answer)]
        context, count = self.assistant.model.config.max_position_embeddings, len(list(counted))
        if len(self.assistant.renderer.prompt(turns)) + count >= context:
            print(f"(cut: the model's context of {context:,} tokens is full; /reset begins anew)", file=sys.stderr)
        elif count == self.max_new_tokens:
            print(f"(cut after {count:,} tokens; --max-new-tokens allows more)", file=sys.stderr)


def converse(chat: Chat) -> None:
    """Read a line and respond to it, until the user ends."""
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
            if command == "/help":
                print(HELP)
            elif command in ("/reset", "/system"):
                chat.turns.clear()
                chat.system = argument.strip() if command == "/system" else chat.system
            elif command.startswith("/"):
                print(f"error: {printable(command)}: no such command; /help lists them", file=sys.stderr)
            elif line.strip():
                try:
                    chat.ask(line.strip())
                except KeyboardInterrupt:
                    print(" (stopped)")
                except UserError as error:
                    print(f"error: {printable(error, PATH)}; /reset begins anew", file=sys.stderr)


@contextmanager
def history() -> Iterator[None]:
    """Remember typed lines for the arrow keys, also in later conversations."""
    try:
        import readline
    except ImportError:  # Python built without it
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    file = (state if state.is_absolute() else Path.home() / ".local/state") / "minisft" / "history"
    readline.set_history_length(1000)
    with suppress(OSError):  # it may not exist yet
        readline.read_history_file(file)
    try:
        yield
    finally:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
            file.chmod(0o600)
        except OSError as error:
            print(f"{printable(file, PATH)}: cannot save the history: {error.strerror}", file=sys.stderr)


def harmless(text: str) -> str:
    """`text` with control characters, which would steer the terminal, shown as their numbers."""
    return "".join(f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
