"""True, false, uncertain."""

from tests.scoring_cases import Answers

# One line holds many.
# fmt: off
TRUTHS = [
    Answers(
        "True",
        right=[
            "True", "true", "TRUE", "True.", "TRUE.", "true!", " True ", r"\text{True}",
            r"\textbf{True}", r"\mathrm{True}", r"\texttt{True}", r"\mathbf{True}", r"\text{true}",
            r"\textbf{TRUE}", r"\text{True.}", "**True**", "**True.**", "*True*", "`True`",
            "'True'", '"True"', "“True”", "$True$", r"$\text{True}$", r"\(\text{True}\)", "(True)",
            "[True]", "{True}", r"\text{(True)}", "yes", "Yes", "YES", "Yes.", r"\text{Yes}", "T",
            "t", r"\text{T}", "The answer is true", "The answer is True.", "Answer: True",
            "The conclusion is true", "The statement is true.", "It is true",
            "it is therefore true", "The final answer is True", r"True\\",
            r"\textcolor{green}{True}", r"\underline{True}", "True,",
            r"\text{The conclusion is True}", "this statement is true",
        ],
        wrong=[
            "False", "false", "Uncertain", "no", "unknown", "F", "U", "Not true", "not true",
            "untrue", "not True", "True or False", "True/False", "True and False", "True False",
            "true, false", "truee", "Tru", "truth", "truthy", "trueness", "it is not true",
            "The answer is false", "The statement is not true", "1", "0", "A", "B", "C", "", "?",
            "maybe", "neither", "half true", "partly true", "mostly true", "probably true",
            "true if it rains", "True unless false", r"\text{False}", r"\textbf{False}",
            r"\text{Uncertain}", r"\top", r"$T \to F$", "TT", "yes and no", "yesterday",
            "yes or no", "yess", "none", "the answer", "it is", "Not uncertain",
            "cannot be determined", "true uncertain",
        ],
    ),
    Answers(
        "False",
        right=[
            "False", "false", "FALSE", "False.", r"\text{False}", r"\textbf{false}",
            r"\textbf{False.}", r"\mathrm{False}", r"\texttt{False}", "**False**", "`False`",
            "'False'", '"False"', "(False)", "[false]", "$False$", r"\(\text{False}\)", "no", "No",
            "NO.", r"\text{No}", "F", "f", "The answer is false", "The answer is: False",
            "Answer: False", "The conclusion is False.", "the statement is false", "It is false",
            "therefore false", "{False}", r"\color{red}{False}", "False!", r"\boldsymbol{False}",
            r"\text{ False }",
        ],
        wrong=[
            "True", "true", "Uncertain", "yes", "T", "U", "not false", "Not False", "unfalse",
            "falsee", "Fals", "falsehood", "not true", "Not true", "untrue", "false or true",
            "False, True", "False/Uncertain", "False or Uncertain", "probably false",
            "false positive", "no one", "not", "nothing", "know", "0", "1", "", "no idea",
            "No information", "The answer is true", "it is not false", r"\text{True}", r"\bot",
            "unknown", "uncertain", "cannot be determined", "nope or yes", "none", "FF", "-",
        ],
    ),
    Answers(
        "Uncertain",
        right=[
            "Uncertain", "uncertain", "UNCERTAIN", "Uncertain.", r"\text{Uncertain}",
            r"\textbf{Uncertain}", r"\mathrm{Uncertain}", "**Uncertain**", "`Uncertain`",
            "'Uncertain'", "(Uncertain)", "unknown", "Unknown.", r"\text{Unknown}", "undetermined",
            "indeterminate", "inconclusive", "unsure", "U", "u", "cannot be determined",
            "Cannot be determined.", "can't be determined", "can\u2019t be determined",
            "can not be determined", "It cannot be determined", "it can't be determined",
            "cannot be known", "cannot be inferred", "cannot be concluded", "cannot determine",
            "Cannot tell", "cannot say", "cannot conclude", "not enough information",
            "Not enough information.", r"\text{Not enough information}",
            "insufficient information", "Insufficient evidence", "not enough evidence",
            "insufficient data", "not certain", "not known", "not determined",
            "The answer is uncertain", "The conclusion is uncertain.", "Answer: Uncertain",
            "the statement is unknown", "it is uncertain", "The answer is not known",
        ],
        wrong=[
            "True", "False", "true", "false", "yes", "no", "T", "F", "certain", "certainly",
            "known", "determined", "not uncertain", "not unknown", "can be determined",
            "it can be determined", "enough information", "sufficient information", "information",
            "Uncertain or True", "True or Uncertain", "uncertain, false", "Uncertain/False",
            "uncertainty", "uncertainly", "un certain", "unc", "0", "1", "C", "", "?", "neither",
            "neither true nor false", "both", "maybe true", "true or false", "unlikely", "likely",
            "untrue", "not true", "not false", r"\text{True}", r"\text{False}", "random",
        ],
    ),
    Answers(
        True,
        right=["true", "yes", "True", r"\text{true}", "The answer is true."],
        wrong=["false", "no", "uncertain", "True or False", "1"],
    ),
    Answers(
        False,
        right=["false", "no", "False", r"\text{false}", "The answer is false."],
        wrong=["true", "yes", "unknown", "not true", "0"],
    ),
]
