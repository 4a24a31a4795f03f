"""The families: small functions as templates.

A template's fields are ``f`` (the function), roles of variables (see :mod:`rehearsal.environments.repair.programs`) and
numbers of its own. Programs with bugs are run in our own process, and lines are all that is counted there: no template
may, with a bug or three, do more in a line than a few numbers or short texts take (no powers, nothing that doubles).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """A template of programs.

    Attributes:
        name: of the family.
        about: what the function gives, as a template.
        functions: what it may be called.
        takes: kinds of its arguments.
        source: the template of a correct program, one statement a line.
        numbers: the range of each of its numbers, both ends included.
    """

    name: str
    about: str
    functions: tuple[str, ...]
    takes: tuple[str, ...]
    source: str
    numbers: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def _family(name: str, about: str, functions: str, takes: str, source: str, **numbers: tuple[int, int]) -> Family:
    kinds = tuple(kind.strip() for kind in takes.split(","))
    return Family(name, about, tuple(functions.split()), kinds, source.strip("\n"), numbers)


FAMILIES: tuple[Family, ...] = (
    _family("sum above", "the sum of the numbers above {k}", "sum_above total_over add_large sum_big", "ints", """
def {f}({xs}):
    {acc} = 0
    for {x} in {xs}:
        if {x} > {k}:
            {acc} += {x}
    return {acc}
""", k=(0, 8)),
    _family("count multiples", "how many numbers {k} divides", "count_multiples multiples divisible", "ints", """
def {f}({xs}):
    {count} = 0
    for {x} in {xs}:
        if {x} % {k} == 0:
            {count} += 1
    return {count}
""", k=(2, 5)),
    _family("largest", "the largest number", "largest biggest maximum top", "some ints", """
def {f}({xs}):
    {acc} = {xs}[0]
    for {x} in {xs}[1:]:
        if {x} > {acc}:
            {acc} = {x}
    return {acc}
"""),
    _family("spread", "the largest number less the smallest", "spread span width extent", "some ints", """
def {f}({xs}):
    {y} = {xs}[0]
    {acc} = {xs}[0]
    for {x} in {xs}:
        {y} = min({y}, {x})
        {acc} = max({acc}, {x})
    return {acc} - {y}
"""),
    _family("factorial", "the product of 1 to {n}", "factorial product_to fact", "small", """
def {f}({n}):
    if {n} == 0:
        return 1
    return {n} * {f}({n} - 1)
"""),
    _family("fibonacci", "number {n} of 0, 1, 1, 2, 3, 5, ...", "fibonacci fib series_at", "small", """
def {f}({n}):
    if {n} < 2:
        return {n}
    return {f}({n} - 1) + {f}({n} - 2)
"""),
    _family("recursive sum", "the sum of the numbers", "add_all sum_list total_of", "ints", """
def {f}({xs}):
    if not {xs}:
        return 0
    return {xs}[0] + {f}({xs}[1:])
"""),
    _family("power", "{x} to the power of {n}", "power raised to_the", "int, small", """
def {f}({x}, {n}):
    {acc} = 1
    for {i} in range({n}):
        {acc} *= {x}
    return {acc}
"""),
    _family("digit sum", "the sum of the digits of {n}", "digit_sum cross_sum add_digits", "large", """
def {f}({n}):
    {acc} = 0
    while {n} > 0:
        {acc} += {n} % 10
        {n} //= 10
    return {acc}
"""),
    _family("in base", "{n} in base {k}, as a text", "to_base in_base digits_of", "large", """
def {f}({n}):
    if {n} == 0:
        return "0"
    {acc} = ""
    while {n} > 0:
        {acc} = str({n} % {k}) + {acc}
        {n} //= {k}
    return {acc}
""", k=(2, 9)),
    _family("reverse", "{word} backwards", "reverse backwards mirrored turn_round", "word", """
def {f}({word}):
    {acc} = ""
    for {ch} in {word}:
        {acc} = {ch} + {acc}
    return {acc}
"""),
    _family("vowels", "how many letters are vowels", "count_vowels vowels vowel_count", "word", """
def {f}({word}):
    {count} = 0
    for {ch} in {word}:
        if {ch} in "aeiou":
            {count} += 1
    return {count}
"""),
    _family("palindrome", "whether {word} is the same backwards", "is_palindrome symmetric same_backwards", "word", """
def {f}({word}):
    {i} = 0
    {j} = len({word}) - 1
    while {i} < {j}:
        if {word}[{i}] != {word}[{j}]:
            return False
        {i} += 1
        {j} -= 1
    return True
"""),
    _family("index", "the first place of {x}, or -1", "index_of find_first position where_is", "ints, int", """
def {f}({xs}, {x}):
    for {i} in range(len({xs})):
        if {xs}[{i}] == {x}:
            return {i}
    return -1
"""),
    _family("running totals", "the sums of the first 1, 2, ... numbers", "running_totals prefix_sums sums", "ints", """
def {f}({xs}):
    {count} = 0
    {acc} = []
    for {x} in {xs}:
        {count} += {x}
        {acc}.append({count})
    return {acc}
"""),
    _family("differences", "each number less the one before it", "differences steps_of changes gaps", "ints", """
def {f}({xs}):
    {acc} = []
    for {i} in range(1, len({xs})):
        {acc}.append({xs}[{i}] - {xs}[{i} - 1])
    return {acc}
"""),
    _family("clamp", "{x}, but at least {low} and at most {high}", "clamp limited bounded keep_within", "int", """
def {f}({x}):
    if {x} < {low}:
        return {low}
    if {x} > {high}:
        return {high}
    return {x}
""", low=(-2, 3), high=(5, 9)),
    _family("grade", "high from {high} on, middle from {low} on, else low", "grade level_of rank rated", "int", """
def {f}({x}):
    if {x} >= {high}:
        return "high"
    if {x} >= {low}:
        return "middle"
    return "low"
""", low=(0, 4), high=(6, 10)),
    _family("greatest divisor", "the largest number that divides both", "gcd common_divisor shared_factor",
            "positive, positive", """
def {f}({n}, {d}):
    while {d} > 0:
        {n}, {d} = {d}, {n} % {d}
    return {n}
"""),
    _family("prime", "whether {n} is a prime", "is_prime prime no_divisor", "positive", """
def {f}({n}):
    if {n} < 2:
        return False
    for {d} in range(2, {n}):
        if {n} % {d} == 0:
            return False
    return True
"""),
    _family("halving", "halvings and triplings from {n} to 1", "chain_length steps_to_one collatz", "positive", """
def {f}({n}):
    {count} = 0
    while {n} != 1:
        if {n} % 2 == 0:
            {n} = {n} // 2
        else:
            {n} = 3 * {n} + 1
        {count} += 1
    return {count}
"""),
    _family("distinct", "the numbers without repetitions", "distinct unique without_repeats", "digits", """
def {f}({xs}):
    {acc} = []
    for {x} in {xs}:
        if {x} not in {acc}:
            {acc}.append({x})
    return {acc}
"""),
    _family("pairs", "how many pairs come to {k}", "count_pairs pairs_with_sum matches", "ints", """
def {f}({xs}):
    {count} = 0
    for {i} in range(len({xs})):
        for {j} in range({i} + 1, len({xs})):
            if {xs}[{i}] + {xs}[{j}] == {k}:
                {count} += 1
    return {count}
""", k=(2, 9)),
    _family("longest word", "the first of the longest words", "longest longest_word widest", "words", """
def {f}({words}):
    {acc} = ""
    for {word} in {words}:
        if len({word}) > len({acc}):
            {acc} = {word}
    return {acc}
"""),
    _family("initials", "the first letters in upper case", "initials first_letters acronym", "some words", """
def {f}({words}):
    {acc} = ""
    for {word} in {words}:
        {acc} += {word}[0].upper()
    return {acc}
"""),
    _family("long words", "the words of more than {k} letters", "long_words longer_than keep_long", "words", """
def {f}({words}):
    {acc} = []
    for {word} in {words}:
        if len({word}) > {k}:
            {acc}.append({word})
    return {acc}
""", k=(1, 4)),
    _family("weighted sum", "each number times its place from 1 on, added up", "weighted weighted_sum by_place",
            "ints", """
def {f}({xs}):
    {acc} = 0
    for {i} in range(len({xs})):
        {acc} += ({i} + 1) * {xs}[{i}]
    return {acc}
"""),
    _family("every one", "the first number and every {k} numbers one more", "every_other thinned sampled", "ints", """
def {f}({xs}):
    {acc} = []
    {i} = 0
    while {i} < len({xs}):
        {acc}.append({xs}[{i}])
        {i} += {k}
    return {acc}
""", k=(2, 3)),
    _family("rotated", "the list with its first {k} numbers at the end", "rotated shifted turned", "ints", """
def {f}({xs}):
    {acc} = []
    for {x} in {xs}[{k}:]:
        {acc}.append({x})
    for {x} in {xs}[:{k}]:
        {acc}.append({x})
    return {acc}
""", k=(1, 3)),
    _family("longest run", "the most equal numbers in a row", "longest_run longest_streak most_equal", "digits", """
def {f}({xs}):
    {acc} = 1
    {count} = 1
    for {i} in range(1, len({xs})):
        if {xs}[{i}] == {xs}[{i} - 1]:
            {count} += 1
        else:
            {count} = 1
        {acc} = max({acc}, {count})
    return {acc}
"""),
    _family("merged", "both sorted lists in one sorted list", "merged merge join_sorted",
            "sorted ints, sorted ints", """
def {f}({xs}, {ys}):
    {acc} = []
    {i} = 0
    {j} = 0
    while {i} < len({xs}) and {j} < len({ys}):
        if {xs}[{i}] <= {ys}[{j}]:
            {acc}.append({xs}[{i}])
            {i} += 1
        else:
            {acc}.append({ys}[{j}])
            {j} += 1
    return {acc} + {xs}[{i}:] + {ys}[{j}:]
"""),
    _family("even and odd", "the sum of the even numbers less that of the odd ones", "even_less_odd balance parity_gap",
            "ints", """
def {f}({xs}):
    {acc} = 0
    for {x} in {xs}:
        if {x} % 2 == 0:
            {acc} += {x}
        else:
            {acc} -= {x}
    return {acc}
"""),
    _family("sorted", "the numbers in order", "in_order ascending sort_list", "ints", """
def {f}({xs}):
    {acc} = {xs}[:]
    for {i} in range(len({acc})):
        for {j} in range({i} + 1, len({acc})):
            if {acc}[{j}] < {acc}[{i}]:
                {acc}[{i}], {acc}[{j}] = {acc}[{j}], {acc}[{i}]
    return {acc}
"""),
    _family("all between", "whether all numbers lie from {low} to {high}", "all_between all_within in_bounds",
            "ints", """
def {f}({xs}):
    for {x} in {xs}:
        if {x} < {low} or {x} > {high}:
            return False
    return True
""", low=(-2, 1), high=(6, 9)),
)  # fmt: skip
