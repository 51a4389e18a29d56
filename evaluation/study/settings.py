"""What the maker of a study decides, and the texts that its pages begin with."""

from typing import Annotated, Literal

from pydantic import Field

from ...cache.frozen import Frozen, Positive, Text

Shown = Literal["words", "sentences", "labels"]
CONFIDENCES = ("guessing", "unsure", "fairly sure", "certain")
"""Names of the confidences 1 to 4."""

CONSENT = """\
This study asks how well people understand groups of words that a computer program found inside a language model. You \
will see such groups, and guess how the model classified a text that you do not see.

Taking part is voluntary. You can stop at any time, without giving a reason, by closing the page; you can come back to \
the same link later and go on.

What is stored: your answers, how sure you were, and how long each answer took. Your name, your address on the \
network and your browser are not stored. The answers are used for research and may be published."""

INSTRUCTIONS = """\
A language model read a text and put it into one of a few classes. You do not see the text. You see a group of words \
and sentences that the model treats as alike; one word of the text belongs to this group.

For each question, look at the words and sentences, and answer which class the model gave to the text. The bar beside \
a word says how much of the group it makes up. In the sentences, the word that belongs to the group is marked.

Often there is no sure answer: say how sure you are. Please answer by yourself, without looking anything up."""
PRACTICE = "You begin with questions for practice, and are told the right answer after each."
CHECKS = "Now and then a question only checks that you read: it tells you what to answer."


class StudySettings(Frozen):
    """Settings of a study with people. Texts are plain: an empty line begins a new paragraph."""

    title: Annotated[Text, Field(min_length=1, max_length=200)] = "What does the model see?"
    consent: Annotated[Text, Field(min_length=1, max_length=20_000)] = CONSENT
    """What a person agrees to before the first question."""
    instructions: Annotated[Text, Field(min_length=1, max_length=20_000)] = INSTRUCTIONS
    """Followed, where the items have them, by a sentence on practice and one on attention checks."""
    contact: Annotated[Text, Field(max_length=2_000)] = ""
    """Whom to ask; shown on the first and the last page."""
    completion: Annotated[Text, Field(max_length=2_000)] = ""
    """Shown at the end, for example a code that people give to be paid."""
    per_annotator: Positive | None = None
    """Main questions per person; every main item once where it is not given."""
    show: Annotated[tuple[Shown, ...], Field(min_length=1)] = ("words", "sentences")
    """`labels`, the classes of the concept's texts, gives much of the answer away."""
    words: Literal["cloud", "list"] = "cloud"
    annotators: Annotated[Positive, Field(le=10_000)] = 10
    """Planned number: so many links and booklets are made."""
    idle_minutes: Positive = 60
    """After so long without an answer, a person's open questions are given to others as well."""
    seed: int = 0
