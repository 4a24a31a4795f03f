"""The words of the help desk: facts, matters, names, and what clerks and forms say.

Everything is short and comes back often, so that a small vocabulary spells it in few tokens.
"""

from __future__ import annotations

FACTS = ("account", "card", "document", "pin", "callback")
"""What a company may want, in the order in which facts are shown."""

GATHER = {
    "account": "look up account",
    "card": "look up card",
    "document": "look up document",
    "pin": "ask pin",
    "callback": "ask callback",
}
"""The action that gathers each fact: the first three are on file, the others only the customer knows."""

GIVE = {fact: f"give {fact}" for fact in FACTS}
"""The action that gives each fact to the company."""

REACH = {"phone": "call", "form": "open form"}
"""The action that reaches a company, by its channel."""

LEAVE = {"phone": "hang up", "form": "close form"}
"""The action that gives up what was reached, by channel."""

MATTERS = ("refund", "contract", "address", "bill", "repair")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")

CUSTOMERS = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ines", "Jon", "Kira", "Leo", "Mara", "Nils", "Olga",
    "Paul",
)  # fmt: skip

CHANNEL_WORDS = {"phone": "phone", "form": "web form"}
"""What a channel is called in the first observation."""

OPENINGS = (
    "Customer {customer}, company {company}, {channel}, {day}. The matter: {matter}.",
    "It is {day}. Settle the {matter} of {customer} with {company} by {channel}.",
    "{customer} asks for help with {company}. Matter: {matter}. Today: {day}. Way: {channel}.",
)
"""The first observation."""

PHRASES = {
    "account": ("the account number", "the number of the account", "your account number", "the account"),
    "card": ("the last four card digits", "the end of the card number", "the last digits of the card", "the card"),
    "document": ("a document", "a signed document", "a copy of the document", "the document"),
    "pin": ("the pin", "the secret pin", "your pin", "the pin code"),
    "callback": ("a callback number", "the callback number", "a phone for a callback", "a callback phone"),
}
"""How each fact is called by those who want it. The name of the fact is among the words, the others vary."""

WANT = {
    "phone": (
        "Clerk: We need {facts}.",
        "Clerk: Please tell me {facts}.",
        "Clerk: I must ask for {facts}.",
        "Clerk: First give me {facts}.",
    ),
    "form": (
        "Form: Please fill in {facts}.",
        "Form: You must enter {facts}.",
        "Form: We need {facts}.",
        "Form: First give {facts}.",
    ),
}
"""What a company wants in any case, by channel."""

ALSO = {
    "matter": (
        "For {one} and {other} we also need {fact}.",
        "If it is about {one} or {other}, also {fact}.",
        "Matters of {one} and {other} also need {fact}.",
    ),
    "day": (
        "On {one} and {other} we also need {fact}.",
        "If it is {one} or {other}, also {fact}.",
        "{one} and {other} also need {fact}.",
    ),
}
"""What is wanted for two of the matters, or on two of the days; said only when it applies."""

MORE = {
    "phone": ("Clerk: Thank you. What else?", "Clerk: Good. And the rest?", "Clerk: Noted. Go on."),
    "form": ("Form: Saved. Go on.", "Form: One field done.", "Form: Next field."),
}
SETTLED = {"phone": "Clerk: Done. The matter is settled.", "form": "Form: Sent. The matter is settled."}
LACKING = {"phone": "Clerk: Then we cannot help. Goodbye.", "form": "Form: Not complete. It was not sent."}
NEEDLESS = {"phone": "Clerk: We do not need that.", "form": "Form: There is no such field."}
LEFT = {"phone": "You hung up. The matter is not settled.", "form": "You closed the form. The matter is not settled."}
WRONG_CHANNEL = {"phone": "{company} has only a phone.", "form": "{company} has only a web form."}
"""The answer to the other channel's action, by the channel that the company has."""

FOUND = "You have it."
TWICE = "You have that already."
FULL = "You have no time for more."
READY = "Ready: {facts}."

NAME_HEADS = (
    "Alt", "Bran", "Bril", "Cask", "Cor", "Dal", "Dorn", "Drev", "Elb", "Fal", "Fenn", "Flor", "Gant", "Gim", "Grel",
    "Hald", "Hest", "Ilm", "Jarn", "Jos", "Kald", "Kest", "Lor", "Lund", "Mab", "Mer", "Mund", "Nald", "Nev", "Orm",
    "Ost", "Pask", "Pel", "Prin", "Quen", "Rand", "Ros", "Sarn", "Skel", "Sul", "Tarn", "Tel", "Trov", "Ulv", "Varn",
    "Vel", "Wend", "Zor",
)  # fmt: skip
NAME_TAILS = (
    "abo", "ada", "afi", "ako", "amba", "ando", "aqua", "arex", "atu", "avi", "aza", "eba", "edo", "efex", "ega",
    "eko", "elio", "emix", "enda", "epo", "eris", "eton", "evo", "exa", "iba", "idex", "ifo", "igo", "ika", "ilo",
    "imar", "ino", "iplex", "irus", "iso", "itec", "iva", "izon", "oba", "odan", "ofex", "ogo", "oka", "olin", "omo",
    "onix", "opal", "uvo",
)  # fmt: skip
"""Every head with every tail makes a company's name."""
