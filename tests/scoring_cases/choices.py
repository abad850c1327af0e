"""Multiple choice: index of the right one, labels, texts."""

from tests.scoring_cases import Answers

# One line holds many.
# fmt: off
LETTERS = ("A", "B", "C", "D")
FIVE = ("A", "B", "C", "D", "E")
NUMERALS = ("1", "2", "3", "4")

FOG = ("a marsh", "a tundra", "the plains", "a desert")
COUNTS = ("2", "3", "4", "5")
DEEDS = ("answer questions", "eat", "choice of words", "rest")
BANKS = ("bank", "river bank", "department store", "bank")
ADA = ("Ada teaches.", "Ada learns, and reads.", "Ada writes (at night).", "None of the above.")
GRADES = ("a", "b", "c", "no grade")
VERBS = ("ignore", "enforce", "too casual", "yell at", "avoid")

CHOICES = [
    Answers(
        (1, LETTERS, FOG),
        right=[
            "B", "b", "(B)", "(b)", "B.", "B)", "B:", "B,", "B;", "B!", "[B]", "{B}", "<B>", " B ",
            "'B'", '"B"', "`B`", r"\text{B}", r"\textbf{(B)}", r"\mathrm{B}", r"\mathbf{B}",
            r"\text{(B)}", r"\textbf{B.}", "**B**", "**(B)**", "$B$", r"\(B\)", r"\left(B\right)",
            r"\text{ B }", "Option B", "option (B)", "Choice B", "choice: B", "Letter B",
            "label B", "Answer: B", "Answer (B)", "answer B", "The answer is B",
            "The answer is: B", "The answer is (B).", "the correct answer is B",
            "The correct option is B.", "the correct choice is (B)", "The best answer is B",
            "It is B", "The answer is option B", "The correct answer is choice (B)", "B. a tundra",
            "B: A tundra", "(B) a tundra", "(B) a tundra.", "B) a tundra", "B - a tundra",
            "B \u2013 a tundra", "B \u2014 a tundra", "B = a tundra", "B a tundra", "B, a tundra",
            "B (a tundra)", "B. tundra", r"\text{B. a tundra}", r"\text{B}. \text{a tundra}",
            r"B: \text{a tundra}", r"B.\ \text{a tundra}", r"\textbf{B: a tundra}", "a tundra",
            "A Tundra.", "tundra", "the tundra", "a tundra (B)", "a tundra, B", "“a tundra”", "2",
            "2.", "(2)", "Option 2", "B.\n", "Option B: a tundra", "Answer: B. a tundra",
        ],
        wrong=[
            "A", "C", "D", "E", "a", "Z", "5", "0", "1", "3", "22", "-2", "2.5", "1/2", "", "?",
            "()", "none", "None of the above", "not B", "B or C", "A or B", "A, B", "A and B",
            "B/C", "AB", "BB", "B B", "B1", "BC", "B. a marsh", "A. a tundra", "(A) a tundra",
            "a tundra (A)", "a marsh", "the plains", "a tundra or a marsh", "a tundra and a marsh",
            "tun", "a tund", "tundras", "any tundra", "B because it is cold", "B is wrong", "all",
            "all of the above", r"\text{A}", r"\text{Option A}", "The answer is A",
            "The answer is", "option", "Option C: a tundra", "B: a marsh", "x", "beta", r"\beta",
            "True",
        ],
    ),
    Answers(
        (0, LETTERS, FOG),
        right=[
            "A", "a", "A.", "(A)", "A marsh", "a marsh", "A a marsh", "the marsh", "marsh",
            "Marsh", "A. a marsh", "1", "The answer is A.",
        ],
        wrong=["0", "B", "B. a marsh", "A. a desert", "a desert", "4", "I", "A B", "Aa"],
    ),
    Answers(
        (3, LETTERS, FOG),
        right=["D", "d", "desert", "a desert", "D. desert", "4", "(D) a desert", "Desert."],
        wrong=["A", "a", "a marsh", "3", "5", "C", "a dessert", "D. a dessert", "d or c"],
    ),
    Answers(
        (1, NUMERALS, FOG),
        right=[
            "2", "2.", "(2)", "2)", "#2", "[2]", "**2**", r"\text{2}", r"\textbf{(2)}", "Option 2",
            "option (2)", "Option number 2", "option #2", "The answer is option 2",
            "The correct answer is option 2.", "The answer is 2", "2. a tundra", "2: a tundra",
            "2) a tundra", "2 - a tundra", "(2) a tundra", "2 (a tundra)", "2, a tundra",
            "Option 2: a tundra", "a tundra", "tundra", "a tundra (2)", "B", "(B)", "b",
            "B. a tundra", "$2$", r"\text{Option } 2",
        ],
        wrong=[
            "1", "3", "4", "5", "0", "12", "22", "-2", "2.5", "20", "A", "C", "E", "1 or 2",
            "1, 2", "1 and 2", "2/3", "2-3", "2 3", "2. a marsh", "1. a tundra", "a marsh", "",
            "two or three", "Option 3", "Option", "option 1: a tundra", "2 of them", "II or I",
        ],
    ),
    Answers(
        (0, NUMERALS, FOG),
        right=["1", "A", "a", "1. a marsh", "option 1"],
        wrong=["0", "B", "2", "I", "-1", "10", "11"],
    ),
    Answers(
        (2, NUMERALS, ADA),
        right=[
            "3", "3.", "Ada writes (at night).", "Ada writes (at night)",
            "3. Ada writes (at night).", "C",
        ],
        wrong=["Ada writes.", "Ada teaches.", "4", "3. Ada teaches.", "at night"],
    ),
    Answers(
        (1, NUMERALS, ADA),
        right=[
            "2", "Ada learns, and reads.", "Ada learns, and reads", "2. Ada learns, and reads.",
            "ada learns, and reads",
        ],
        wrong=["Ada learns", "1, 2", "Ada reads", "Ada learns, and reads; Ada teaches."],
    ),
    Answers(
        (3, NUMERALS, ADA),
        right=["4", "None of the above.", "none of the above", "4. None of the above", "D"],
        wrong=["none", "0", "None", "All of the above"],
    ),
    Answers(
        (0, NUMERALS, COUNTS),
        right=["1", "1. 2", "1: 2", "A"],
        wrong=["2. 2", "2", "3", "0", "1. 3", "B"],
    ),
    Answers(
        (1, NUMERALS, COUNTS),
        right=["2", "B", "2. 3"],
        wrong=["3", "1", "2. 2"],
    ),
    Answers(
        (3, NUMERALS, COUNTS),
        right=["4", "5", "D", "4. 5"],
        wrong=["3", "6", "4. 4"],
    ),
    Answers(
        (0, LETTERS, COUNTS),
        right=["2", "A", "A. 2", "(A) 2", "A: 2", "1"],
        wrong=["3", "A. 1", "B", "B. 2"],
    ),
    Answers(
        (1, LETTERS, COUNTS),
        right=["B. 3", "B", "3"],
        wrong=["2", "4", "C", "A. 3"],
    ),
    Answers(
        (0, LETTERS, DEEDS),
        right=[
            "answer questions", "Answer: answer questions", "A", "A. answer questions",
            "Answer questions.",
        ],
        wrong=["questions", "answer", "choice of words", "eat", "answers questions"],
    ),
    Answers(
        (2, LETTERS, DEEDS),
        right=["choice of words", "C", "C. choice of words", "The choice of words"],
        wrong=["answer questions", "of words", "words", "choice"],
    ),
    Answers(
        (3, LETTERS, BANKS),
        right=["D. bank", "D", "(D) bank", "4"],
        wrong=["bank", "A. bank", "river bank", "the bank"],
    ),
    Answers(
        (1, LETTERS, BANKS),
        right=["river bank", "B", "B. river bank", "the river bank"],
        wrong=["bank", "river", "B. bank"],
    ),
    Answers(
        (0, FIVE, VERBS),
        right=["A", "ignore", "A. ignore", r"\text{A. ignore}", "Ignore", "(A) ignore", "1"],
        wrong=["E", "ignored", "B. ignore", "A. enforce", "avoid", "5", "F", "to ignore"],
    ),
    Answers(
        (4, FIVE, VERBS),
        right=["E", "e", "E. avoid", "avoid", "5", "(E)"],
        wrong=["A", "F", "D", "6", "E. yell at", "e2"],
    ),
    Answers(
        (2, LETTERS, GRADES),
        right=["C", "c", "C. c", "3"],
        wrong=["a", "b", "B", "no grade", "A"],
    ),
]
