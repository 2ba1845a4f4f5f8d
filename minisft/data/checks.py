"""The laws of a tokenised document, checked on the tokens themselves before they are stored.

A user's own template can begin twice, and we would train on a fault in the renderer without noticing. So every document
is checked once more, from its ids and its mask alone and from what the template says:

    known ids            every id is in the tokenizer's vocabulary
    nothing smuggled     the control tokens are those of the template: none came from a conversation's text
    one beginning        the beginning-of-text token comes first, if the template begins with it, and nowhere else
    trained stop         a trained answer ends in a stop token, which is trained too
    something to learn   at least one token is trained

A breach ends the run: its cause is the template or the program, so many documents would have it. What a person wrote
may break no law and still be seldom meant (ODD); that is counted, and reported if a hundredth of the records has it.
"""

import re
from collections.abc import Iterator

import numpy as np

from minisft.data.chat import EncodedDocuments, Renderer
from minisft.data.conversation import Conversation
from minisft.errors import UserError

Array = np.ndarray
CHAT = ("system", "user", "assistant")
ODD = {  # what turns of some roles contain -> the roles, marks of which one must be there, a pattern, why it matters
    "placeholders": (
        CHAT, ("{{",), r"\{\{ ?[^\W\d][\w. -]{0,40}\}\}", "the model would learn to write them; fill them in"),
    "prompts that another program has rendered": (
        CHAT, ("###", "<|", "[INST]", "<start_of_turn>"),
        r"(?m:^)### ?(?:Instruction|Input|Response|Human|Assistant|User|Talimat|Girdi|Yanıt|Soru|Cevap)\b|\[INST\]|"
        r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant|system|endoftext)\|>|<start_of_turn>",
        "the template is written around them once more, and their marks stay text; give the turns alone"),
    "conversations rendered to one text": (
        ("text",), ("###", "<|", "[/INST]", "<start_of_turn>"),  # marks of answers: a text may have other headings
        r"### ?(?:Response|Assistant|Yanıt|Cevap) ?:|\[/INST\]|<\|(?:im_start|start_header_id|eot_id|assistant)\|>|"
        "<start_of_turn>model",
        "their marks stay text, and the questions are trained too; give the turns as messages"),
}
OURS = "this is a fault of minisft, please report it"


def oddities(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """(key of ODD, the first place) for what is seldom meant in the messages of a conversation."""
    for what, (roles, marks, pattern, _) in ODD.items():
        texts = [text for turn in conversation.turns if turn.role in roles for text in (turn.content, turn.context)]
        likely = (text for text in texts if any(mark in text for mark in marks))
        if found := next(filter(None, (re.search(pattern, text) for text in likely)), None):
            yield what, repr(found[0])


def validate(documents: EncodedDocuments, conversations: list[Conversation], renderer: Renderer) -> None:
    """Raise UserError for the first breach. `conversations` are those that became the documents, in the same order."""
    for places, law, remedy in _breaches(documents, conversations, renderer):
        if not len(places):
            continue
        place, tokenizer = int(places[0]), renderer.tokenizer
        index = int(np.searchsorted(documents.offsets, place, side="right")) - 1
        token = int(documents.ids[place]) if place < len(documents.ids) else None
        text = "" if token is None or token >= tokenizer.vocab_size else f" {tokenizer.decode([token])!r}"
        raise UserError(f"{conversations[index].source}:{conversations[index].line}: {law}: token "
                        f"{place - documents.offsets[index]} of the document is {token}{text}; {remedy}")


def _breaches(documents: EncodedDocuments, conversations: list[Conversation],
              renderer: Renderer) -> Iterator[tuple[Array, str, str]]:
    """For each law: the places of the tokens that break it, what is wrong with them, the remedy."""
    tokenizer, template, split = renderer.tokenizer, renderer.template, renderer.split
    ids, loss_mask, offsets = documents.ids.astype(np.int64), documents.loss_mask, documents.offsets
    yield (np.flatnonzero(ids >= tokenizer.vocab_size), "an id beyond the tokenizer's vocabulary",
           f"the vocabulary has {tokenizer.vocab_size} ids; tokenizer.json is damaged, download it again")

    is_control, placed = np.isin(ids, list(tokenizer.control.values())), documents.controls >= 0
    wrong = np.where(is_control, ids, -1) != documents.controls
    yield np.flatnonzero(wrong & placed), "not the control token that the template put there", OURS
    yield (np.flatnonzero(wrong & ~placed), "a control token that the template did not put there",
           "text of a conversation must not become one; see special and normalized in the added tokens of "
           f"{tokenizer.file}")

    begin, is_first = split(template.begin, False), np.isin(np.arange(len(ids)), offsets[:-1])
    # The tokenizer knows its beginning-of-text token; otherwise it is what the template begins with and never repeats.
    roles = split("".join((*template.system, *template.user, *template.assistant)), False)
    bos = tokenizer.bos or next((piece.text for piece in begin[:1] if piece.control and piece not in roles), "")
    bos_id, begins, stop_ids = tokenizer.control.get(bos, -1), bos in [p.text for p in begin[:1]], renderer.stop_ids()
    is_bos = ids == bos_id
    if begins:
        yield (np.flatnonzero(is_first & ~is_bos), "the beginning-of-text token is missing",
               f"begin of template {template.name} must come first, once")
    if bos_id not in stop_ids:  # if one token is both, it also stands at the ends
        yield (np.flatnonzero(is_bos & ~(is_first & begins)), "a second beginning-of-text token" if begins else
               "a beginning-of-text token that is not the template's begin",
               f"in template {template.name} put it into begin, once, and nowhere else")

    document = np.repeat(np.arange(len(conversations)), np.diff(offsets))
    is_last, is_stop = np.append(document[1:] != document[:-1], True)[: len(ids)], np.isin(ids, list(stop_ids))
    ends = np.flatnonzero(loss_mask & (is_last | ~np.append(loss_mask[1:], False)))  # of runs of trained tokens
    inner = ends[~is_last[ends]]
    remedy = (f"the model would never learn to stop; in template {template.name} the second item of assistant is the "
              "stop token, and its third is not trained")
    yield inner[is_stop[inner + 1] & ~is_stop[inner]] + 1, "a stop token after trained text is not trained", remedy
    if renderer.train_on == "all":
        ends = ends[is_last[ends]]  # a run that ends inside a document ends before an answer that is left out
    if not any(piece.control for piece in split(template.document_end, False)):
        ends = ends[[conversations[i].turns[0].role != "text" for i in document[ends].tolist()]]

    def tail(marker: str) -> list[int]:
        """What follows the last stop token of `marker`."""
        found = [token for piece in split(marker, False) for token in (
            [tokenizer.control[piece.text]] if piece.control else tokenizer.encode(piece.text))]
        return found[max((i + 1 for i, token in enumerate(found) if token in stop_ids), default=0) :]

    # What may follow the stop token in a run: \n in chatml, whose third item is trained by train_on = "all".
    after = template.assistant[1:] if renderer.train_on == "all" else template.assistant[1:2]
    tails = [tail("".join(after)), tail(template.document_end)]

    def stopped(end: int, tail: list[int]) -> bool:
        stop = end - len(tail)
        return bool(stop >= offsets[document[end]] and is_stop[stop] and loss_mask[stop:end].all()
                    and ids[stop + 1 : end + 1].tolist() == tail)

    unstopped = [end for end in ends[~is_stop[ends]].tolist() if not any(stopped(end, tail) for tail in tails)]
    yield np.array(unstopped), "a trained answer ends without a trained stop token", remedy
    yield offsets[:-1][documents.num_loss_tokens == 0], "no trained token in the document", OURS
