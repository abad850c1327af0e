"""Mathematical expressions."""

from tests.scoring_cases import Answers

# One line holds many.
# fmt: off
EXPRESSIONS = [
    Answers(
        r"\frac{14}{3}",
        right=[
            r"\frac{14}{3}", "14/3", r"\dfrac{14}{3}", r"\tfrac{14}{3}", r"4\frac{2}{3}", "4 2/3",
            r"\frac{28}{6}", r"\frac{-14}{-3}", r"\left(\frac{14}{3}\right)", r"4.\overline{6}",
            r"\frac{14}{3} \text{ units}", r"$\frac{14}{3}$", r"x = \frac{14}{3}",
            r"\displaystyle\frac{14}{3}", "14 / 3", r"{14 \over 3}",
        ],
        wrong=[
            r"\frac{3}{14}", "4.66", "4.67", r"-\frac{14}{3}", r"\frac{14}{3}x",
            r"4 + \frac{1}{3}", "14", "143", r"14 \text{ or } 3", r"\frac{13}{3}", r"\frac{14}{",
            r"\frac{14}{0}",
        ],
    ),
    Answers(
        r"\left( 3, \frac{\pi}{2} \right)",
        right=[
            r"(3, \pi/2)", r"\left(3,\frac{\pi}{2}\right)", r"(3,\frac\pi2)",
            r"(3, \frac{\pi}{2})", r"(3, 0.5\pi)", r"\left(3, \dfrac{\pi}{2}\right)",
        ],
        wrong=[
            r"(\frac{\pi}{2}, 3)", r"(3, \pi)", r"(-3, \frac{\pi}{2})", r"(3, -\frac{\pi}{2})",
            "(3, 90)", "3", r"\frac{\pi}{2}", r"\{3, \frac{\pi}{2}\}",
        ],
    ),
    Answers(
        "p - q",
        right=["p - q", "p-q", "-q + p", "-(q-p)", r"\(p-q\)", r"p\,-\,q"],
        wrong=["q - p", "p + q", "p", "pq", "-p - q", "p/q"],
    ),
    Answers(
        r"\text{Evelyn}",
        right=[
            "Evelyn", r"\text{Evelyn}", r"\textbf{Evelyn}", "evelyn", "EVELYN", "Evelyn.",
            r"\mathrm{Evelyn}",
        ],
        wrong=[r"\text{Carla}", "Eve", "E", "Evelyn and Carla", "Evelyn or Carla", "5"],
    ),
    Answers(
        r"\text{east}",
        right=["east", "East", r"\text{East}", '"east"'],
        wrong=["west", "northeast", "e", "east or west", "ease"],
    ),
    Answers(
        r"\text{(C)}",
        right=["C", "(C)", r"\text{C}", r"\textbf{(C)}", r"\text{(C)}", "C."],
        wrong=["B", "(B)", "D", "c + 1", "A, C", "(A)"],
    ),
    Answers(
        r"90^\circ",
        right=[
            "90", r"90^\circ", r"90^{\circ}", "90°", "90 degrees", r"90\text{ degrees}",
            r"90.0^\circ",
        ],
        wrong=["80", "9", r"\frac{\pi}{3}", "180", "-90", r"90 \pm 1", "90 or 270"],
    ),
    Answers(
        r"3\sqrt{13}",
        right=[
            r"3\sqrt{13}", r"3 \sqrt{13}", r"\sqrt{117}", r"3\cdot\sqrt{13}", r"\sqrt{9 \cdot 13}",
            r"3 \times \sqrt{13}", r"3\sqrt {13}",
        ],
        wrong=[
            r"13\sqrt{3}", "10.8167", r"\sqrt{13}", r"3\sqrt{31}", r"-3\sqrt{13}", "313",
            r"3+\sqrt{13}", r"3\sqrt[3]{13}",
        ],
    ),
    Answers(
        "6 - 5i",
        right=["6-5i", "-5i + 6", "6 - 5i", "(6-5i)"],
        wrong=["6+5i", "-6+5i", "6-5", "5-6i", "6", "1", "6 - 5j"],
    ),
    Answers(
        "x=5",
        right=["5", "x = 5", "x=5", "5.0", r"x = \frac{10}{2}", "x=5.", "$x=5$"],
        wrong=["x = -5", "6", "x = 5, 6", "x=15", "x=5 or x=6", "x=0.5", "y"],
    ),
    Answers(
        "1,-2",
        right=[
            "1,-2", "-2, 1", "1, -2", "-2,1", r"1 \text{ and } -2", "x = 1, -2", r"1\text{ or }-2",
        ],
        wrong=["1, 2", "-1, 2", "1", "-2", "1,-2,3", "-1"],
    ),
    Answers(
        "3, 5, 7",
        right=["3, 5, 7", "3,5,7", "7, 5, 3", "5,3,7", r"3,\ 5,\ 7", r"3,5,\text{ and }7"],
        wrong=["3,5", "3, 5, 8", "357", "15", "3,5,7,9", "7"],
    ),
    Answers(
        "52_8",
        right=["52_8", "52_{8}", "52", r"52_{\text{8}}", "52_8."],
        wrong=["53_8", "52_9", "52_{10}", "25_8", "42", "520", "52_{7}"],
    ),
    Answers(
        "2516_8",
        right=["2516_8", "2516_{8}"],
        wrong=["2516_{9}", "2561_8", "1358_8", "251_8"],
    ),
    Answers(
        r"11\sqrt2",
        right=[
            r"11\sqrt{2}", r"11\sqrt2", r"11 \sqrt 2", r"\sqrt{242}", r"11\cdot\sqrt2",
            r"\frac{22}{\sqrt2}",
        ],
        wrong=[r"2\sqrt{11}", "15.556", "11", r"\sqrt{22}", "22", r"11\sqrt{3}"],
    ),
    Answers(
        "0.15",
        right=["0.15", "3/20", ".15", r"\frac{3}{20}", "0.150", r"\frac{15}{100}", "1.5e-1"],
        wrong=["1.5", "15", "0.015", "0.51", "-0.15", r"\frac{20}{3}", "0,15", "15%"],
    ),
    Answers(
        "2k+2",
        right=["2k+2", "2(k+1)", "2k + 2", "2+2k", "2 + 2 k", r"2\cdot k+2"],
        wrong=["2k+1", "2k", "k+2", "2k-2", "4k", "2", "2n+2"],
    ),
    Answers(
        r"1 \pm \sqrt{19}",
        right=[
            r"1 \pm \sqrt{19}", r"1\pm\sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}",
            r"x = 1 \pm \sqrt{19}",
        ],
        wrong=[
            r"1 + \sqrt{19}", r"1 - \sqrt{19}", r"1 \pm \sqrt{17}", r"-1 \pm \sqrt{19}", "1",
            r"\pm\sqrt{19}",
        ],
    ),
    Answers(
        "x^3+3x-6",
        right=[
            "x^3+3x-6", "x^3 - 6 + 3x", "x^3+3 x-6", "x^{3}+3x-6", "3x + x^3 - 6", "x³+3x-6",
            "x(x^2+3)-6",
        ],
        wrong=["x^3+3x+6", "x^3-3x-6", "x^2+3x-6", "3x-6", "x^3", "y^3+3y-6", "x^3+3x-6=1"],
    ),
    Answers(
        "(6,31,-1)",
        right=[
            "(6, 31, -1)", "(6,31,-1)", r"\left(6,31,-1\right)", r"(6,\ 31,\ -1)", "(6.0,31,-1)",
        ],
        wrong=["(6,31,1)", "(31,6,-1)", "(6,31)", "(-1,31,6)", r"\{6,31,-1\}", "36", "(6,31,-1,0)"],
    ),
    Answers(
        "(-2,1)",
        right=["(-2,1)", "(-2, 1)", r"\left(-2, 1\right)", r"x \in (-2,1)"],
        wrong=["[-2,1]", "(1,-2)", "(-2,1]", "[-2,1)", "-2", r"\{-2,1\}", "(2,1)", "(-2,1) or 3"],
    ),
    Answers(
        "[1,2]",
        right=["[1,2]", "[1, 2]", r"1 \le x \le 2", r"1 \leq x \leq 2", r"x \in [1,2]"],
        wrong=["(1,2)", "1 < x < 2", r"1 \le x", "1", "2", "[2,1]", "[1,3]", r"\{1,2\}", "1,2"],
    ),
    Answers(
        r"(3,\infty)",
        right=[r"(3,\infty)", r"(3, +\infty)", "x > 3", "3 < x", r"x \in (3,\infty)"],
        wrong=[r"x \ge 3", r"[3,\infty)", "x < 3", "3", r"(-\infty,3)", "(3,4)", r"\infty"],
    ),
    Answers(
        "[1,2)",
        right=["[1,2)", "[1, 2)", r"\left[1,2\right)", r"x \in [1,2)"],
        wrong=["(1,2)", "[1,2]", "(1,2]", "[1,3)", r"[1,\infty)"],
    ),
    Answers(
        r"(-\infty,2)\cup(3,\infty)",
        right=[
            r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)",
            r"(-\infty, 2) \cup (3, \infty)", r"\left(-\infty,2\right)\cup\left(3,\infty\right)",
            r"x \in (-\infty,2) \cup (3,\infty)",
        ],
        wrong=[
            r"(-\infty,2]\cup[3,\infty)", "(2,3)", r"(-\infty,2)", r"(-\infty,\infty)", "[2,3]",
            r"(-\infty,3)\cup(2,\infty)",
        ],
    ),
    Answers(
        r"\{1,2\}",
        right=[r"\{1,2\}", r"\{2,1\}", r"\left\{1,2\right\}", "1,2", r"\{1, 2\}", r"x \in \{1,2\}"],
        wrong=["(1,2)", "[1,2]", r"\{1,3\}", r"\{1\}", r"\{1,2,3\}", "3", "12"],
    ),
    Answers(
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        right=[
            r"\begin{pmatrix}-1/3\\2/3\\5/3\end{pmatrix}",
            r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
            r"\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \\ \frac{5}{3} \end{pmatrix}",
            r"\begin{bmatrix} -1/3 \\ 2/3 \\ 5/3 \end{bmatrix}",
            r"\frac{1}{3}\begin{pmatrix} -1 \\ 2 \\ 5 \end{pmatrix}",
        ],
        wrong=[
            r"\begin{pmatrix} 1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
            r"\begin{pmatrix} 2/3 \\ -1/3 \\ 5/3 \end{pmatrix}",
            r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix}-1\\2\\5\end{pmatrix}",
            "2/3",
        ],
    ),
    Answers(
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        right=[
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
            r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",
            r"\left(\begin{matrix}1&2\\3&4\end{matrix}\right)",
        ],
        wrong=[
            r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}",
            r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}",
            r"\begin{pmatrix} 1 & 2 & 3 & 4 \end{pmatrix}", "-2",
        ],
    ),
    Answers(
        "2220",
        right=[
            "2220", "2,220", "2{,}220", r"2,\!220", r"\$2{,}220", "2220 meters", r"2220\text{ m}",
            "2220.0", "2220.",
        ],
        wrong=["2.220", "222", "22200", "2220x", "2,22", "-2220", r"2220\pi", "2220 or 2221"],
    ),
    Answers(
        r"11,\! 111,\! 111,\! 100",
        right=[
            "11111111100", "11,111,111,100", "11{,}111{,}111{,}100", r"11\,111\,111\,100",
            "11 111 111 100",
        ],
        wrong=["11,111,111,10", "11, 111, 111", "1111111100", "11"],
    ),
    Answers(
        r"-\frac{\pi}{6}",
        right=[
            r"-\frac{\pi}{6}", r"-\pi/6", r"\frac{-\pi}{6}", r"-\dfrac{\pi}{6}",
            r"-\frac{1}{6}\pi", r"-\frac\pi6", r"\frac{\pi}{-6}",
        ],
        wrong=[
            r"\frac{\pi}{6}", "-0.5236", r"-\frac{\pi}{3}", "-30", r"-\frac{6}{\pi}",
            r"-\frac{1}{6}",
        ],
    ),
    Answers(
        r"\pi",
        right=[r"\pi", "π", r"1\pi", r"\frac{2\pi}{2}"],
        wrong=["3.14", "3.14159", r"2\pi", r"-\pi", "p", "180", r"\frac{22}{7}"],
    ),
    Answers(
        r"\cot x",
        right=[r"\cot x", r"\cot(x)", r"\cot{x}", r"\frac{\cos x}{\sin x}", r"\frac{1}{\tan x}"],
        wrong=[r"\tan x", r"\cot y", r"-\cot x", r"\cot 2x", r"\cos x", "x"],
    ),
    Answers(
        r"\frac{3\sqrt{3}}{4}",
        right=[
            r"\frac{3\sqrt{3}}{4}", r"\frac{3 \sqrt 3}{4}", r"\frac34\sqrt3",
            r"\frac{3}{4}\sqrt{3}", r"3\sqrt{3}/4", r"\frac{9}{4\sqrt3}", r"0.75\sqrt3",
        ],
        wrong=[
            r"\frac{\sqrt3}{4}", r"\frac{4}{3\sqrt3}", "1.299", r"\frac{3\sqrt{2}}{4}", r"3\sqrt3",
            r"\frac34",
        ],
    ),
    Answers(
        "x^5 - x^4 + x^3 - x^2 + x - 1",
        right=["x^5-x^4+x^3-x^2+x-1", "(x-1)(x^4+x^2+1)", "-1+x-x^2+x^3-x^4+x^5"],
        wrong=["x^5+x^4+x^3+x^2+x+1", "x^5-x^4+x^3-x^2+x", "x^5-1", "x - 1"],
    ),
    Answers(
        "y = 2x + 3",
        right=["y = 2x + 3", "y=2x+3", "2x+3", "y = 3 + 2x"],
        wrong=["y = 2x - 3", "y = 3x + 2", "x = 2y + 3", "5", "y = 2x", "y>2x+3"],
    ),
    Answers(
        "x > 3",
        right=["x > 3", "x>3", "3 < x", "$x>3$"],
        wrong=[r"x \ge 3", "x < 3", "3", "x > 4", r"x \le 3"],
    ),
    Answers(
        "1024",
        right=[
            "1024", "2^{10}", "2^10", "4^5", "1,024", "32^2", r"2^5 \cdot 2^5", r"\sqrt{1048576}",
        ],
        wrong=["1000", "210", "2^9", "10^2", "2^{11}", "102", "1024^2"],
    ),
    Answers(
        "10",
        right=[
            "10", r"\binom{5}{2}", "10.0", "2+8", r"2 \cdot 5", "20/2", r"\sqrt{100}", "10 cm",
            r"10\text{ cm}^2", r"\log_2 1024", "|-10|",
        ],
        wrong=[
            "-10", "100", "1", "0.1", r"10\pi", r"\frac{1}{10}", "10i", r"\binom{5}{3}x", "ten",
            "10!", "01",
        ],
    ),
    Answers(
        "400000",
        right=[r"4\times 10^5", r"4 \cdot 10^5", "400,000", "400000", "4e5", "400 000"],
        wrong=[r"4\times 10^4", r"4\times 10^{-5}", "4", "45", "40,000"],
    ),
    Answers(
        r"\frac{1}{\sqrt{2}}",
        right=[
            r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}", r"\sqrt{\frac{1}{2}}", r"\sqrt{0.5}",
            "2^{-1/2}", r"\frac{\sqrt2}2",
        ],
        wrong=[r"\sqrt{2}", "0.707", r"\frac{1}{2}", r"-\frac{\sqrt2}{2}", r"\frac{2}{\sqrt2}"],
    ),
    Answers(
        r"\emptyset",
        right=[r"\emptyset", r"\varnothing"],
        wrong=["0", r"\{0\}", "x", r"\infty"],
    ),
    Answers(
        r"\text{no solution}",
        right=[r"\text{no solution}", r"\text{No solution}", "no solution", "No Solution"],
        wrong=["0", r"\text{one solution}", r"\text{solution}", "no"],
    ),
    Answers(
        r"\infty",
        right=[r"\infty", r"+\infty"],
        wrong=[r"-\infty", "0", "1", r"\text{large}"],
    ),
    Answers(
        "3:2",
        right=["3:2", "3 : 2"],
        wrong=["2:3", "3:4", "32", "3", "6"],
    ),
    Answers(
        r"60\%",
        right=[r"60\%", "60", "60%", "60 percent"],
        wrong=["0.06", "6%", "600%", "-60%", "40%"],
    ),
    Answers(
        "5",
        right=["5", r"5\text{ cm}", "5.0"],
        wrong=[
            "5a", "the answer", r"\boxed{", r"\frac{", "5 apples or 6", "6", "?", "",
            r"\text{five}", "x",
        ],
    ),
    Answers(
        "12",
        right=["12"],
        wrong=["1 2", "14 or fifteen", "12 and a half", "1, 2", "21"],
    ),
]
