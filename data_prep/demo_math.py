"""Arithmetic word problems with worked solutions, every number exact: the demo's "math" domain.

A problem is a short story about one running quantity. Each sentence changes it by one operation, some sentences change
nothing, and a last question may compare two people. Wording comes from templates in which ``(a|b|c)`` is a choice and
``{field}`` a value, so that a few lines of template give thousands of sentences.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a // b}
LARGEST = 50_000  # a quantity above it is no longer a plausible number of marbles


@dataclass(frozen=True)
class Step:
    """One line of the worked solution: ``left op right = result``, in integers."""

    left: int
    op: str
    right: int
    result: int


@dataclass(frozen=True)
class Problem:
    """A problem's whole text (story, solution, ``Answer: N``) and the arithmetic that it claims."""

    text: str
    steps: tuple[Step, ...]
    answer: int


@dataclass(frozen=True)
class World:
    """Sentence templates of one kind of story, by what they do to the running quantity."""

    things: tuple[str, ...]
    opening: tuple[str, ...]
    product: tuple[str, ...]  # an opening that multiplies {n} by {k}
    change: dict[str, tuple[str, ...]]
    question: tuple[str, ...]
    rival: tuple[str, ...]  # what {other} has, {compare} the running quantity
    together: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


HER = _words(
    "Amelia Beatrice Carmen Dolores Esther Freya Greta Hannah Ingrid Julia Katya Leila Mei Nadia Olive Priya Rosa"
)
HIS = _words(
    "Abdul Boris Carlos Dmitri Edgar Felix Gustav Hassan Igor Jonas Kenji Lorenzo Mateo Nikhil Oscar Pedro Quentin"
)
PEOPLE = [(name, "she", "her") for name in HER] + [(name, "he", "his") for name in HIS]
THEN = "(Then|Later|After that|The next day|On {day}|In the evening|A week later|Soon afterwards)"

WORLDS = (
    World(
        _words("marbles stamps shells buttons coins postcards beads stickers pebbles feathers badges crayons"),
        (
            "{name} (has|owns|keeps) {n} {thing} in (a drawer|a tin|the attic|an old box|a glass jar).",
            "There are {n} {thing} in {name}'s (collection|cupboard|suitcase|desk).",
            "{name} starts the (week|month|year|game) with {n} {thing}.",
        ),
        (
            "{name} (buys|finds|opens|unpacks) {k} (bags|boxes|packets) of {thing}, with {n} {thing} in each.",
            "{name} (arranges|lays out|sorts) {thing} in {k} rows of {n}.",
        ),
        {
            "+": (
                THEN + " {name} (finds|buys|wins|collects) {n} more.",
                "{his} (aunt|uncle|cousin|neighbour|teacher) (gives|sends|brings) {name} {n} more {thing}.",
                "{name} trades an old (bicycle|radio|kite|book) for another {n} {thing}.",
            ),
            "-": (
                THEN + " {he} (loses|sells|gives away|breaks) {n} of them.",
                "{n} {thing} (go missing|are stolen|fall into the river|turn out to be broken).",
                "{name} (sends|lends|hands) {n} {thing} to (a friend|{his} brother|{his} sister|a museum).",
            ),
            "*": (
                THEN + " the collection grows to {n} times its size.",
                "{name} works hard until {he} has {n} times as many {thing}.",
            ),
            "/": (
                "{name} (shares|divides) them equally among {n} (children|friends|jars) and counts one share.",
                THEN + " only one {thing1} in every {n} is kept.",
            ),
        },
        (
            "How many {thing} (does {name} have now|are left in the end|does {he} end up with)?",
            "(Work out|Find) the (final |)number of {thing}.",
        ),
        (
            "{other} has {compare} {thing} (as|than) {name}.",
            "{name}'s friend {other} owns {compare} {thing}.",
        ),
        ("How many {thing} do {name} and {other} have (together|in total|altogether)?",),
    ),
    World(
        _words("dollars euros pounds crowns francs"),
        (
            "{name} (saves|has saved|keeps) {n} {thing} for (a holiday|a new coat|a piano|the winter|a wedding).",
            "There are {n} {thing} in {name}'s (account|wallet|purse|piggy bank).",
        ),
        (
            "{name} (earns|is paid) {n} {thing} (an hour|a day|a lesson) and works {k} of them.",
            "{name} sells {k} (chairs|paintings|lamps|tickets|baskets) at {n} {thing} each.",
        ),
        {
            "+": (
                THEN + " {he} (earns|receives|inherits|wins) {n} {thing}.",
                "A (grandfather|customer|bank|client) pays {name} {n} {thing}.",
                "{name} sells {his} old (guitar|camera|table|sledge) for {n} {thing}.",
            ),
            "-": (
                THEN + " {he} (spends|pays|loses) {n} {thing} (on food|on rent|on a gift|at the fair|for repairs).",
                "A (plumber|dentist|mechanic|tailor) charges {name} {n} {thing}.",
                "{name} (donates|lends) {n} {thing} to (a school|a neighbour|the library|a hospital).",
            ),
            "*": (
                "A lucky investment multiplies the money by {n}.",
                THEN + " {his} savings become {n} times as large.",
            ),
            "/": (
                "{name} splits the money equally into {n} (envelopes|accounts|parts) and keeps one.",
                "A crisis leaves only one part in {n} of the money.",
            ),
        },
        (
            "How (much money|many {thing}) does {name} have (now|in the end|left)?",
            "What is the final sum in {thing}?",
        ),
        ("{other} has {compare} {thing} (as|than) {name}.",),
        ("How many {thing} do {name} and {other} have (together|in total|between them)?",),
    ),
    World(
        _words("loaves candles bricks baskets jars bottles cakes chairs lanterns tiles"),
        (
            "A (workshop|factory|small firm) run by {name} has {n} {thing} in (stock|the store|the cellar).",
            "{name} (makes|delivers|orders) {n} {thing} for the (market|festival|harbour|town hall).",
        ),
        (
            "{name}'s (workshop|factory) makes {n} {thing} a day for {k} days.",
            "A lorry brings {name} {k} crates, each holding {n} {thing}.",
        ),
        {
            "+": (
                THEN + " the night shift makes {n} more {thing}.",
                "A (van|ship|train|cart) delivers another {n} {thing}.",
                "{n} {thing} are returned by a (shop|hotel|customer).",
            ),
            "-": (
                THEN + " {n} {thing} are (sold|shipped|thrown away|given to charity).",
                "An inspector rejects {n} of the {thing}.",
                "A (storm|fire|flood|careless driver) destroys {n} {thing}.",
            ),
            "*": (
                "A new machine raises the stock to {n} times what it was.",
                "An order from abroad asks for {n} times that number, and {name} makes them all.",
            ),
            "/": (
                "The {thing} are packed evenly into {n} (crates|lorries|wagons), and we look at one of them.",
                "They are divided equally among {n} (shops|villages|hotels); consider what one receives.",
            ),
        },
        (
            "How many {thing} (are there now|remain|does that leave)?",
            "What number of {thing} does {name} report?",
        ),
        ("{other}'s firm has {compare} {thing} (as|than) {name}'s.",),
        ("How many {thing} do the two firms have (together|in all)?",),
    ),
    World(
        _words("kilometres miles pages metres lines"),
        (
            "{name} plans a (project|task|route) of {n} {thing}.",
            "The (first|old|short) plan that {name} writes is for {n} {thing}.",
        ),
        (
            "{name} covers {n} {thing} an hour for {k} hours.",
            "{name} does {n} {thing} every day for {k} days in a row.",
        ),
        {
            "+": (
                THEN + " {he} adds {n} {thing}.",
                "A (detour|mistake|second thought) makes it {n} {thing} longer.",
                "{name} goes on for another {n} {thing}.",
            ),
            "-": (
                "A (shortcut|friend|better map) saves {n} {thing}.",
                THEN + " {he} crosses out {n} {thing}.",
                "{n} of those {thing} do not count.",
            ),
            "*": (
                "{name} decides to do all of it {n} times.",
                "The whole is repeated by {n} people, and their {thing} are summed.",
            ),
            "/": (
                "The work is shared equally by {n} (people|teams), and {name} is one of them.",
                "{name} spreads it evenly over {n} (days|weeks) and asks about one of them.",
            ),
        },
        ("How many {thing} is that?", "How many {thing} (does {name} note down|must be done|are counted)?"),
        ("{other} does {compare} {thing} (as|than) {name}.",),
        ("How many {thing} do {name} and {other} do (together|in total)?",),
    ),
)

ASIDES = (
    "{name} is {n} years old.",
    "It is a (cold|rainy|sunny|windy|quiet) (morning|afternoon|evening) in (March|May|July|October|December).",
    "{his} (dog|cat|parrot|horse) sleeps (by the fire|under the table|in the garden).",
    "The nearest (town|station|bakery) is {n} minutes away.",
    "{name} lives in a (red|white|small|tall) house with {n} windows.",
    "Nobody (notices|complains|says a word).",
)
LEADS = (
    ("First", "To begin with", "We start with this", "At the start"),
    ("Then", "Next", "After that", "From this"),
)
LAST = ("Finally", "In the end", "So at last", "Therefore")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def spin(template: str, rng: random.Random, fields: dict[str, object]) -> str:
    """Choose one branch of each ``(a|b|c)``, fill the fields, and begin with a capital letter."""
    while (found := re.search(r"\(([^()]*)\)", template)) is not None:
        template = template[: found.start()] + rng.choice(found[1].split("|")) + template[found.end() :]
    sentence = template.format(**fields)
    return sentence[0].upper() + sentence[1:]


def _operand(op: str, value: int, rng: random.Random) -> int | None:
    """A right-hand side that keeps the quantity a positive integer in range; None where there is none."""
    if op == "+":
        return rng.randint(3, 400)
    if op == "-":
        return rng.randint(2, min(value - 2, 400)) if value > 8 else None
    if op == "*":
        return rng.randint(2, min(12, LARGEST // value)) if value * 2 <= LARGEST else None
    divisors = [d for d in range(2, 13) if value % d == 0 and value // d > 1]
    return rng.choice(divisors) if divisors else None


def _compare(value: int, rng: random.Random) -> tuple[str, Step]:
    """What the other person has, in words and as a step from the running quantity."""
    op = rng.choice(["*", "+", "-"] if value > 8 else ["*", "+"])
    amount = rng.randint(2, 9) if op == "*" else rng.randint(2, min(value - 2, 300) if op == "-" else 300)
    words = {"*": "{} times as many", "+": "{} more", "-": "{} fewer"}[op].format(amount)
    return words, Step(value, op, amount, APPLY[op](value, amount))


def make_problem(rng: random.Random) -> Problem:
    """One problem of two to four steps, drawn from ``rng``."""
    world = rng.choice(WORLDS)
    (name, he, his), (other, _, _) = rng.sample(PEOPLE, 2)
    thing = rng.choice(world.things)
    fields: dict[str, object] = {"name": name, "he": he, "his": his, "other": other, "thing": thing}
    fields["thing1"] = thing.removesuffix("s")

    def say(templates: tuple[str, ...], **values: object) -> str:
        return spin(rng.choice(templates), rng, fields | {"day": rng.choice(DAYS)} | values)

    wanted, compares = rng.randint(2, 4), rng.random() < 0.25
    steps: list[Step] = []
    value = rng.randint(12, 480)
    if rng.random() < 0.4:
        value, factor = rng.randint(3, 99), rng.randint(3, 24)
        story = [say(world.product, n=value, k=factor)]
        steps.append(Step(value, "*", factor, value * factor))
        value *= factor
    else:
        story = [say(world.opening, n=value)]
    while len(steps) < wanted - 2 * compares or not steps:
        op = rng.choice("++--*/")
        if (amount := _operand(op, value, rng)) is None:
            continue
        story.append(say(world.change[op], n=amount))
        steps.append(Step(value, op, amount, APPLY[op](value, amount)))
        value = steps[-1].result
    if rng.random() < 0.4:
        story.insert(rng.randint(1, len(story)), say(ASIDES, n=rng.randint(3, 79)))
    if compares:
        words, step = _compare(value, rng)
        total = Step(value, "+", step.result, value + step.result)
        steps += [step, total]
        # "3 more as Rosa" would be wrong: the word after the comparison follows from it.
        rival = tuple(t.replace("(as|than)", "as" if step.op == "*" else "than") for t in world.rival)
        story += [say(rival, compare=words), say(world.together)]
        value = total.result
    else:
        story.append(say(world.question))
    return Problem(_written(story, steps, thing, rng), tuple(steps), value)


def _written(story: list[str], steps: list[Step], thing: str, rng: random.Random) -> str:
    """The problem's text: the story on one line, a line a step, and the answer on the last."""
    lines = []
    for number, step in enumerate(steps):
        lead = rng.choice(LAST if number == len(steps) - 1 else LEADS[min(number, 1)])
        lines.append(f"{lead}, {step.left} {step.op} {step.right} = {step.result} {thing}.")
    return "\n".join(["Problem: " + " ".join(story), "Solution:", *lines, f"Answer: {steps[-1].result}"])


def word_problems(seed: int) -> Iterator[Problem]:
    """Problems without end, no text twice; the same ones for the same seed."""
    rng = random.Random(f"word problems {seed}")  # a string seed is hashed with sha512: the same on every machine
    seen: set[str] = set()
    while True:
        problem = make_problem(rng)
        if problem.text not in seen:
            seen.add(problem.text)
            yield problem
