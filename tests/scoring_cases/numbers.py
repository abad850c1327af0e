"""Numbers."""

from tests.scoring_cases import Answers

# One line holds many.
# fmt: off
NUMBERS = [
    Answers(
        "18",
        right=[
            "18", "18.0", "18.", "018", "+18", " 18 ", "18.000", "\uff11\uff18", "18...", "$18",
            r"\$18", r"\$18.00", "€18", "18€", "£18", "₹18", "18¢", "US$18", "USD 18", "18 USD",
            "Rs. 18", "Rs 18", "$18.00 USD", r"\$ 18", r"\text{\$}18", r"\text{\$18}",
            "18 dollars", r"18\text{ eggs}", r"18 \text{ eggs per day}", "18 (dollars)", "18 kg",
            "18 m", "18 boys and girls", "18 more eggs than Bob", "18 miles per hour", "18 mph",
            r"18 \text{ dollars}", r"18\;\text{cm}", r"18~\text{cm}", r"18\mbox{ cm}", "18 sq. ft",
            r"18\hspace{2pt}\text{cm}", r"18\space dollars", "18 ft", "18 lbs.", "18 hours",
            "18 m^2", "18 m²", r"18\,\text{m}^2", r"18 \text{ cm}^{3}", "18°C",
            r"18^\circ\text{C}", "18 °F", "18 miles/hour", r"18\ \mathrm{km/h}",
            r"18 \frac{\text{miles}}{\text{hour}}", "18 of them", "18 years old",
            "18 cookies (total)", "18 one-dollar bills", "18 pm", r"$\$18$", "$18$", "$$18$$",
            r"\(18\)", r"\[18\]", "**18**", "`18`", '"18"', "$18$ dollars", r"\textbf{18}",
            r"\mathbf{18}", r"\boldsymbol{18}", r"{\bf 18}", r"\textcolor{red}{18}",
            r"\color{blue}{18}", r"\underline{18}", r"\mathrm{18}", r"\phantom{0}18", r"\quad 18",
            r"18\\", r"18\,", r"18\text{.}", "(18)", "[18]", "{18}", r"\{18\}", r"\left(18\right)",
            "x = 18", "x=18", r"x \approx 18", "≈ 18", r"\sim 18", "~18", "about 18", "exactly 18",
            "approximately 18 dollars", "Total = 18", "Total: 18", "total: $18",
            "The answer is 18", "The answer is: 18", "The answer is 18.",
            "Janet makes: 18 dollars", "n is 18", "3 + 15 = 18", r"6 \times 3 = 18", "36/2 = 18",
            "36/2", r"\frac{36}{2}", "18/1", "1.8e1", r"1.8 \times 10^1", "18%", r"18\%",
            "18 percent",
        ],
        wrong=[
            "19", "-18", "180", "1.8", "0.18", "81", "17.9999999", "18.0000001", "18.5", "17", "8",
            "18x", "18 x", "18a", "a18", "x18", r"18\pi", "18π", "18n", "18i", "18xy", "18 ab",
            "18A", "18^2", "18²", "18^{2}", r"\sqrt{18}", "18!", r"\overline{18}",
            r"18^\frac{1}{2}", "18 + 2", "20 - 2", "9 * 2", r"9 \cdot 2", r"36 \div 2",
            "18 times x", "18 plus tax", "18 or 19", "18 and 19", "18, 19", "18,19", "18; 19",
            "18 19", "18 to 20", "18-19", "18\u201319", "18..19", "18/19", "18 of 20",
            "18 out of 20", "18:20", "between 18 and 20", "18 dollars or four dollars",
            "18 or four", "18 to four", "18 and a half", "18 not 19", "x = 18, y = 4",
            "y = 4, x = 18", "x = 4 and y = 18", "x = 4 or x = 18", "17 or x = 18", "> 18",
            r"\geq 18", r"\le 18", "more than 18", "at least 18", "not 18", "under 18", "18k",
            "18 million", "18 hundred", "18%%", "--18", "+-18", "18-", "eighteen", "XVIII",
            "18 hours and 30 minutes", "18 hours 30 minutes", "18'6\"", "18:30", "1 8", "1,8", "",
            "?", "-", ".", ",", "$", "%", "nan", "inf", "None", r"\text{none}", r"\frac{18}{0}",
        ],
    ),
    Answers(
        "70000",
        right=[
            "70000", "70,000", "70{,}000", r"70\,000", "70 000", r"70{\,}000", r"70,\!000",
            "70'000", "70\u2019000", "70\u00a0000", "70\u202f000", r"70\;000", "$70,000",
            r"\$70{,}000.00", "70k", "70K", "$70k", "70 thousand", "70 thousand dollars", "7e4",
            "7E4", r"7 \times 10^4", "7*10^4", r"7 \cdot 10^{4}", "7 x 10^4", "7\u00d710⁴",
            "0.07 million", "70,000 people",
        ],
        wrong=[
            "70", "70.000", "70,00", "7,0000", "700,000", "70,000,000", "70, 000", "70 00",
            "7 0000", r"7 \times 10^5", r"7 \times 10^{-4}", "7e5", "7^4", "70 million", "70 km",
            "70 kilo",
        ],
    ),
    Answers(
        "1234567.5",
        right=["1,234,567.5", "1 234 567.50", "12,34,567.5", "$1,234,567.50", "1'234'567.5"],
        wrong=["1.234.567", "1234567", "1,234,5675", "1,23,4567.5", "1.2345675", "12345675"],
    ),
    Answers(
        "1234567",
        right=["1,234,567", "1.234.567", "12,34,567", "1 234 567", "1234.567 thousand"],
        wrong=["1.234567", "1,234.567", "1.23.4567", "123,45,67", "1,234", "1.234.567.8"],
    ),
    Answers(
        "0.5",
        right=[
            "0.5", ".5", "0.50", "1/2", "1 / 2", "2/4", r"\frac{1}{2}", r"\dfrac12",
            r"\tfrac{1}{2}", r"\cfrac{1}{2}", r"\frac12", r"\frac 1 2", r"\frac{1}2",
            r"\nicefrac{1}{2}", r"{1 \over 2}", r"\left(\frac{1}{2}\right)", r"\frac{-1}{-2}",
            r"\frac{0.5}{1}", "½", "1\u20442", "$.50", "½ cup", "50e-2", r"5 \times 10^{-1}",
            r"\frac{1}{2} \text{ cup}", "0.5 of a cup", r"\frac{1,000}{2,000}",
        ],
        wrong=[
            "50%", "50", r"50\%", "-0.5", "0.05", "2", "2/1", r"\frac{2}{1}", r"-\frac{1}{2}",
            "0,5", r"\frac{1}{-2}", r"\frac{1}{2}x", "1/2/1", "1:2", "1-2", "half", "1/2 or 2",
            r"\frac{1}{}",
        ],
    ),
    Answers(
        "50",
        right=["50%", r"50\%", "50 percent", "50 per cent", "50.0%", r"50\text{ percent}", "5e1 %"],
        wrong=["0.5", "1/2", "0.50%", "5%", "500%", "50/100", "half", "-50%"],
    ),
    Answers(
        "-5",
        right=[
            "-5", "\u22125", "\u20135", "- 5", "-5.0", "-$5", "$-5", r"-\$5", "(-5)", "minus 5",
            "negative 5", "-5°C", "x = -5", "-5 dollars", r"\frac{-10}{2}", r"\frac{10}{-2}",
            "-10/2",
        ],
        wrong=["5", "--5", "+5", "5-", "-5-", "- -5", "-50", "-0.5", r"\frac{-10}{-2}", "minus"],
    ),
    Answers(
        "2.75",
        right=[
            "2.75", "2 3/4", r"2\frac{3}{4}", r"2 \frac34", "2¾", "11/4", r"\frac{11}{4}", "$2.75",
            "2.75 miles", r"2\dfrac{3}{4}\text{ hours}", r"2\tfrac34", "2.750", "2 ¾ hours",
        ],
        wrong=[
            "23/4", "2 + 3/4", "2-3/4", "2,75", r"2 \cdot \frac{3}{4}", "2.7", "2.8", "3/4", "2",
            r"\frac{4}{11}", r"-2\frac{3}{4}", "2 3 / 4 / 5", "275", "2.75%x",
        ],
    ),
    Answers(
        "1/3",
        right=[
            r"\frac{1}{3}", "1/3", "2/6", r"0.\overline{3}", r"0.3\overline{3}", r"0.\bar{3}", "⅓",
        ],
        wrong=["0.333", "0.3", "3", "1/3.0001", "33%", r"0.\overline{33}4", r"\overline{3}", "1.3"],
    ),
    Answers(
        "1.2",
        right=[r"1.1\overline{9}", "1.20", "6/5", "120e-2", r"1\frac15", "$1.20"],
        wrong=["12", "1.02", "1.2.0", "1,2", "1..2", "1/2", "1.2.3"],
    ),
    Answers(
        "1000",
        right=["10^3", "10^{3}", "10³", "1E3", "1e3", "1 thousand", "1k", "1,000", "10 hundred"],
        wrong=[
            "10^{-3}", "10^4", "103", "10 3", "10^x", "10^", "10^3^3", "1e", "1e3.5",
            "1e400000000",
        ],
    ),
    Answers(
        "1500000",
        right=["1.5 million", "$1.5 million", "$1.5M", "1.5 million dollars", "1,500,000", "1500k"],
        wrong=["1.5", "15 million", "1.5 billion", "1.5 m", "1,5 million"],
    ),
    Answers(
        "2000000000000",
        right=["2 trillion", "$2 trillion", "2,000,000,000,000", "2000 billion", r"2\times10^{12}"],
        wrong=["2 billion", "2", "2e11", "2t"],
    ),
    Answers(
        "10",
        right=[
            "10:00", "10:00 AM", "10:00 a.m.", "10 AM", "10 a.m.", "10am",
            r"10\text{:}00 \text{ AM}",
        ],
        wrong=["10:30", "1:00", "10:00:00", "10:000", "100", "10:0", "22:00"],
    ),
    Answers(
        "204",
        right=["204", "204.", r"\text{204}", "m+n = 204", "0204", "$m+n=204$"],
        wrong=[
            "20 4", "2 04", "204_8", "402", r"\frac{204}{205}", "m+n", "204, 205", r"204 \pm 1",
            "2.04",
        ],
    ),
    Answers(
        "0",
        right=["0", "0.0", "00", "-0", "0%", "$0", "0 apples", "0/5", r"\frac{0}{7}"],
        wrong=["1", "-1", "1/0", "0/0", "zero", "none", "O", r"\emptyset", "0.01", "null"],
    ),
    Answers(
        "1",
        right=["1", "1.0", "3/3", "100e-2", "1 apple"],
        wrong=["1e999999999", "l", "I", "one", "10^0.5", "1st place or 2nd", "1 in 3", "1 to 1"],
    ),
]
