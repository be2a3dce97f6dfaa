r"""Graded pairs `(answer in the box, reference)`, by what graders are known to get wrong.

`RIGHT` must be correct and `WRONG` incorrect; `unknown` will not do for either.
"""

from __future__ import annotations

Pairs = dict[str, list[tuple[str, str]]]

RIGHT: Pairs = {
    "numbers": [
        ("0.5", r"\frac{1}{2}"),
        (r"\dfrac{2}{4}", r"\frac12"),
        ("1/2", r"\frac{1}{2}"),
        (r"-\frac{3}{5}", r"\frac{-3}{5}"),
        (r"\frac{3}{-5}", r"-\frac{3}{5}"),
        ("1,728", "1728"),
        ("1{,}728", "1728"),
        (r"1\,728", "1728"),
        ("3,985,729,651,808", "3985729651808"),
        ("352", "0352"),
        ("1071.3", "1071.30"),
        ("+7", "7"),
        ("1010_2", "1010"),
        ("7.0", "7"),
        (".5", "0.5"),
        (r"1.5 \times 10^{3}", "1500"),
        (r"2 \cdot 10^{-2}", "0.02"),
        (r"2^{10}", "1024"),
        ("5!", "120"),
        (r"\binom{5}{2}", "10"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
        (r"\sqrt[3]{8}", "2"),
        (r"1\frac{1}{2}", r"\frac{3}{2}"),
        (r"3 \frac{1}{4}", "3.25"),
        (r"0.\overline{3}", r"\frac{1}{3}"),
        (r"e^{\sqrt{2}}", r"\exp(\sqrt{2})"),
        (r"\ln 4", r"2 \ln 2"),
        (r"\frac{\pi}{4}", r"\pi/4"),
        (r"\left(\frac{1}{2}\right)", r"\frac{1}{2}"),
        ("{7}", "7"),
        ("6i\\pi", r"6\pi i"),
        ("4i+3", "3+4i"),
        (r"-\infty", r"- \infty"),
        (r"+\infty", r"\infty"),
        (r"\text{infinity}", r"\infty"),
    ],
    "typography": [
        ("$7$.", "7"),
        ("7", r"\boxed{7}"),
        (r"\displaystyle 7", "7"),
        (r"\(7\)", "7"),
        (r"\tfrac{1}{2}", r"\frac{1}{2}"),
        (r"\mathbf{7}", "7"),
        (r"\left[0,\ 1\right)", "[0,1)"),
        (r"\aleph_0", r"\aleph_0"),
        (r"2^{\aleph_0}", r"2^{\aleph_{0}}"),
        (r"\mathrm{e}", "e"),
        (r"x\,y", "xy"),
        ("−3", "-3"),
    ],
    "algebra": [
        ("x^2+2x+1", "(x+1)^2"),
        ("ad-bc", "(ad - bc)"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
        (r"2\sin x\cos x", r"\sin(2x)"),
        (r"1-\cos^2 x", r"\sin^2 x"),
        (r"\frac{n^2+n}{2}", r"\frac{n(n+1)}{2}"),
        (r"2^{1-n}", r"\dfrac{1}{2^{n-1}}"),
        ("a^{n-1}(a + bn)", "a^n + a^{n-1}bn"),
        (r"\sqrt{n^2 - 1}", r"(n^2-1)^{1/2}"),
        ("2k", r"2 \cdot k"),
        (r"-2\pi a(a + b)", r"-2\pi a^2 - 2\pi ab"),
    ],
    "equations": [
        ("x = 5", "5"),
        ("5", "x=5"),
        ("x=5", r"x = \frac{10}{2}"),
        ("y = 2x+1", "2x+1"),
        ("y = 1 + 2x", "y=2x+1"),
        (r"f(x) = \frac{1}{x}", r"\frac{1}{x}"),
        (r"x^{-1}", r"f(x) = \dfrac{1}{x}"),
        ("x + 8y = -19", "x + 8y + 19 = 0"),
        ("2x + 16y + 38 = 0", "x + 8y + 19 = 0"),
        (r"\alpha > 1", r"1 < \alpha"),
        ("k>1", "k > 1"),
        (r"x \geq 3", r"x \ge 3"),
        (r"3 \le x", r"x \ge 3"),
        ("x=1, y=2", "y=2, x=1"),
    ],
    "units": [
        (r"5 \text{ cm}", "5"),
        ("5", r"5 \text{ cm}"),
        ("5 cm", r"5\ \mathrm{cm}"),
        (r"5\,\text{centimeters}", r"5 \text{ cm}"),
        (r"50 \text{ mm}", r"5 \text{ cm}"),
        (r"25 \text{ cm}^2", "25"),
        (r"25 \text{ square centimeters}", r"25 \text{ cm}^2"),
        ("90^\\circ", "90"),
        ("90", "90^\\circ"),
        (r"90^{\circ}", r"90\text{ degrees}"),
        (r"\$5", "5"),
        ("5 dollars", r"\$5"),
        (r"10 \text{ m/s}", "10"),
        (r"2 \text{ hours}", r"120 \text{ minutes}"),
        (r"6 \text{ ways}", "6"),
    ],
    "percent": [
        (r"50\%", r"50\%"),
        (r"50\%", "0.5"),
        (r"50\%", "50"),
        ("50", r"50\%"),
        ("0.5", r"50\%"),
        (r"\frac{1}{2}", r"50\%"),
        (r"12.5\%", r"12.5\,\%"),
        ("50 percent", r"50\%"),
    ],
    "sequences": [
        ("1728 and 1331", "1331 and 1728"),
        ("1331, 1728", "1331 and 1728"),
        (r"1331 \text{ and } 1728", "1331, 1728"),
        ("2, -2", r"\pm 2"),
        (r"\pm 2", "2, -2"),
        (r"x = \pm 2", "x = 2, x = -2"),
        (r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}"),
        ("x = 2 \\text{ or } x = -2", "2, -2"),
        ("x = 2, 3", r"\{2, 3\}"),
        ("0.5, 0.25", r"\frac{1}{4}, \frac{1}{2}"),
        ("1; 2; 3", "1, 2, 3"),
    ],
    "tuples": [
        ("(1, 2)", r"\left(1,2\right)"),
        (r"(0.5, 2)", r"(\frac{1}{2}, 2)"),
        ("(1,2,3)", r"\langle 1, 2, 3 \rangle"),
        ("(1,2), (3,4)", "(3,4), (1,2)"),
        (r"\{(1,2), (3,4)\}", "(1,2), (3,4)"),
        ("(x, y) = (1, 2)", "(1,2)"),
        ("(-1, 0)", "(-1,0)"),
    ],
    "sets": [
        (r"\{3, 1, 2\}", r"\{1,2,3\}"),
        (r"\{1, 2\}", "1, 2"),
        ("1, 2", r"\{1, 2\}"),
        (r"\{0.5\}", r"\{\frac{1}{2}\}"),
        (r"\{5\}", "5"),
        (r"\emptyset", r"\varnothing"),
        (r"\{\}", r"\emptyset"),
        (r"\left\{4, 5, 7\right\}", r"\{4, 5, 7\}"),
    ],
    "intervals": [
        ("[0, 1)", "[0,1)"),
        (r"[2, \sqrt{8})", r"[2, 2\sqrt{2})"),
        (r"(-\infty, 0) \cup (1, \infty)", r"(1, \infty) \cup (-\infty, 0)"),
        (r"x \in [0, 1)", "[0,1)"),
        ("0 \\le x < 1", "[0,1)"),
        ("[0,1)", "0 \\le x < 1"),
        (r"(1, \infty)", "x > 1"),
        ("x > 1", r"(1, \infty)"),
        (r"(-\infty, \infty)", r"\mathbb{R}"),
        (r"(2, +\infty)", r"(2, \infty)"),
    ],
    "matrices": [
        (
            r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        ),
        (
            r"\begin{pmatrix} 0.5 \\ 1 \end{pmatrix}",
            r"\begin{pmatrix} \frac{1}{2} \\ 1 \end{pmatrix}",
        ),
        (r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}"),
    ],
    "words": [
        ("Yes", r"\text{Yes}"),
        ("yes", "Yes"),
        ("Yes.", "Yes"),
        (r"\textbf{No}", "No"),
        ("True", "Yes"),
        ("no", "False"),
        (r"\text{circle}", "circle"),
        (r"\text{the circle}", "circle"),
        ("DNE", r"\text{does not exist}"),
    ],
    "choices": [
        ("B", r"\textbf{B}"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B)", r"\text{B}"),
        (r"\textbf{(B)}\ 42", "B"),
        (r"\text{B. } 42", "B"),
        ("B: the second", "B"),
        ("Option B", "B"),
        ("(b)", "B"),
    ],
}

WRONG: Pairs = {
    "numbers": [
        ("0.33", r"\frac{1}{3}"),
        ("3.14", r"\pi"),
        ("3.1416", r"\pi"),
        (r"\frac{2}{1}", r"\frac{1}{2}"),
        (".5", "5"),
        ("-3", "3"),
        ("3", "-3"),
        ("12", "1,2"),
        ("1,2", "12"),
        ("1728", "1,782"),
        (r"1\frac{1}{2}", r"\frac{1}{2}"),
        ("0.3", r"0.\overline{3}"),
        (r"1.5 \times 10^{3}", "1.5"),
        (r"10^3", "103"),
        (r"\sqrt{2}", "2"),
        (r"\sqrt[3]{8}", r"3\sqrt{8}"),
        (r"\infty", r"-\infty"),
        ("0", r"\infty"),
        ("3-4i", "3+4i"),
        ("i", "1"),
        (r"\aleph_0", "0"),
        ("1010_2", "1010_3"),
        ("352", "0.352"),
        (r"\pi", "p"),
        ("", "0"),
        ("24", "2^4"),
        ("1e3", "13"),
    ],
    "algebra": [
        ("x^2+1", "(x+1)^2"),
        ("x+1", "x-1"),
        ("2x", "x^2"),
        ("4t", "4"),
        ("4", "4t"),
        ("3m", "3"),
        ("2k", "2"),
        ("x", "y"),
        ("n!", "n"),
        (r"\sin x", r"\sin 2x"),
        (r"\sin^2 x", r"\sin x^2"),
        (r"\ln n", "n"),
        (r"O(n^2)", "O(n)"),
        ("F_{2n+1}", "F_{2n}"),
        ("a_1", "a_2"),
        ("x^2/2", "x^2/2 + C"),
        ("ab", "a+b"),
    ],
    "equations": [
        ("x = 5", "x = 6"),
        ("x = 5", "y = 5"),
        ("x + 8y = 19", "x + 8y + 19 = 0"),
        ("k > 2", "k > 1"),
        ("k < 1", "k > 1"),
        (r"x > 10", r"x \ge 10"),
        (r"x \neq 3", "x = 3"),
        (r"x \le 3", "3"),
        ("x = 1, y = 2", "x = 2, y = 1"),
        ("x=1", "x=1, y=2"),
        ("3 = 5", "3"),
    ],
    "units": [
        ("5 cm", "5 m"),
        (r"5 \text{ cm}", r"5 \text{ m}"),
        (r"5 \text{ cm}", r"5 \text{ cm}^2"),
        (r"5 \text{ kg}", r"5 \text{ cm}"),
        (r"6 \text{ cm}", "5"),
        (r"2 \text{ minutes}", r"2 \text{ hours}"),
        ("90^\\circ", "45"),
        (r"\$5", "6"),
        ("90^\\circ", "90^2"),
    ],
    "percent": [
        (r"5\%", r"50\%"),
        ("0.5", "50"),
        ("50", "0.5"),
        (r"50\%", "5"),
        (r"0.5\%", r"50\%"),
    ],
    "sequences": [
        ("1728", "1331 and 1728"),
        ("1331 and 1728", "1728"),
        ("1331, 1728, 1729", "1331, 1728"),
        ("1331, 1331", "1331, 1728"),
        ("1, 1, 2", "1, 2, 2"),
        ("2", r"\pm 2"),
        (r"\pm 2", "2"),
        ("5 or 6", "5"),
        ("5 and 6", "6"),
        (r"1 \pm \sqrt{3}", r"1 \pm \sqrt{2}"),
        ("1, 2, 3", "1, 2"),
    ],
    "tuples": [
        ("(2, 1)", "(1,2)"),
        ("(3, 1)", "(2,1)"),  # both are empty when they are read as intervals
        ("1, 2", "(1, 2)"),
        ("(1, 2)", "1, 2"),
        ("(1, 2)", r"\{1, 2\}"),
        ("(1,2)", "(1,2,3)"),
        ("(1,2,3)", "(1,3,2)"),
        ("(1,2), (3,4)", "(1,2)"),
        ("(2,1), (4,3)", "(1,2), (3,4)"),
        ("1", "(1, 2)"),
        ("(1, -2)", "(1, 2)"),
    ],
    "sets": [
        (r"\{1, 2\}", r"\{1,2,3\}"),
        (r"\{1,2,3\}", r"\{1, 2\}"),
        (r"\{1, 2\}", r"\{1, 3\}"),
        (r"\{1\}", r"\emptyset"),
        (r"\emptyset", "0"),
        (r"\{0\}", r"\{\}"),
    ],
    "intervals": [
        ("[0, 1]", "[0,1)"),
        ("(0, 1]", "[0,1)"),
        ("[0, 2)", "[0,1)"),
        ("[0, 1]", r"\{0, 1\}"),
        (r"(-\infty, 0)", r"(-\infty, 0) \cup (1, \infty)"),
        (r"(-\infty, 0) \cup (2, \infty)", r"(-\infty, 0) \cup (1, \infty)"),
        (r"(-\infty, 0) \cap (-1, \infty)", r"(-\infty, 0) \cup (-1, \infty)"),
        (r"x \ge 1", r"(1, \infty)"),
        ("0 < x < 1", "[0,1)"),
    ],
    "matrices": [
        (
            r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}",
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        ),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (
            r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}",
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        ),
        ("1", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    ],
    "words": [
        ("No", "Yes"),
        ("on", "No"),
        ("False", "Yes"),
        ("Yes and no", "Yes"),
        ("Yes or No", "No"),
        ("sey", "Yes"),
        ("1", "True"),
        ("0", "No"),
        (r"\text{square}", "circle"),
        (r"\text{circle}", "circel"),
        ("not a circle", "circle"),
    ],
    "choices": [
        ("C", "B"),
        ("b", "B"),
        ("A, B", "B"),
        ("A or B", "B"),
        ("B + C", "B"),
        ("AB", "B"),
        ("ABCDE", "A"),
        ("B", "A, B"),
    ],
    "unbalanced": [
        (r"\frac{1}{", "1"),
        ("5 [[ garbage", "5"),
        (r"\frac{5", "5"),
        ("(5", "(5, 6)"),
        (r"\sqrt{", "0"),
        ("5}", "6"),
        (r"\left(1, 2", "(1,2)"),
    ],
}

# What public failure threads and other graders' tests complain about: one pair a line, as
# answer ~ reference.
_FIELD_RIGHT = r"""
(1/2)^{2024} ~ \left(\frac12\right)^{2024}
2^{-2024} ~ (1/2)^{2024}
\frac{1}{2010!} ~ \frac{2011 \cdot 2012}{2012!}
12,\!345 ~ 12345
e^{\mathrm{i}\pi} ~ -1
\mathrm{e}^{2} ~ e^2
2x - y + 1 = 0 ~ y = 2x+1
y=\frac{1}{x} ~ xy=1
\frac{x}{2}+\frac{y}{3}=1 ~ 3x+2y=6
\{x=1, x=2\} ~ 1,2
x=1,\ y=2 ~ (1,2)
123,456,789 ~ 123456789
153, 370, 371, 407 ~ 153,370,371,407
100,200,300 ~ 100, 200, 300
\text{Tom} ~ Tom
red ~ \text{red}
30 students ~ 30
\text{30 students} ~ 30
5\text{ m/s} ~ 5 m/s
72 \text{ km/h} ~ 20 \text{ m/s}
x\le 1 \text{ or } x\ge 3 ~ (-\infty,1]\cup[3,\infty)
x \in (-\infty, 1] \cup [3, \infty) ~ x \leq 1 \text{ or } x \geq 3
\{x \in \mathbb{R} : x > 2\} ~ (2,\infty)
\{x | -1 < x < 1\} ~ (-1,1)
\mathbb{R} \setminus \{0\} ~ (-\infty,0)\cup(0,\infty)
x \in \mathbb{R}, x \neq 0 ~ x \neq 0
f(x) = 2x \text{ for all real } x ~ f(x)=2x
x \equiv 1 \pmod{5} ~ 1 \pmod 5
6 \pmod 5 ~ 1 \pmod 5
1e-3 ~ 0.001
pi/2 ~ \frac{\pi}{2}
2*pi ~ 2\pi
sqrt(2)/2 ~ \frac{\sqrt{2}}{2}
√2/2 ~ \frac{\sqrt2}{2}
¼ ~ 0.25
3½ ~ 3.5
0.\dot{3} ~ \frac13
**7** ~ 7
\textcolor{red}{7} ~ 7
{\color{blue} 7} ~ 7
\sin 30^\circ ~ \frac12
\tan 45^\circ ~ 1
\cos(60^\circ) ~ 0.5
x=\pm\sqrt{3} ~ \sqrt3, -\sqrt3
\pm\sqrt{2}\pm\sqrt{3} ~ \sqrt2+\sqrt3,\sqrt2-\sqrt3,-\sqrt2+\sqrt3,-\sqrt2-\sqrt3
\angle CBA ~ \angle ABC
\text{May 1, 2024} ~ \text{May 1, 2024}
2024-1-5 ~ 2024-01-05
(C) ~ \text{C}
\text{C and A} ~ A, C
\frac{R}{r} ~ R/r
3.14159265 ~ \pi
2.718281828 ~ e
0.142857142857 ~ \frac17
1{,}000{,}000 ~ 10^6
1.5 \text{ hours} ~ 90 \text{ minutes}
1 \text{ hour } 30 \text{ min} ~ 90 \text{ minutes}
3 \text{ dozen} ~ 36
\$3.50 ~ 3.5
50\text{ cents} ~ \$0.50
25\% ~ \frac14
x^3 - 6x^2 + 11x - 6 ~ (x-1)(x-2)(x-3)
\frac{1}{\sqrt{3}} ~ \frac{\sqrt{3}}{3}
\sqrt{3+2\sqrt2} ~ 1+\sqrt2
\ln\frac{1}{2} ~ -\ln 2
\log_2 8 ~ 3
\frac{a}{b}\cdot c ~ \frac{ac}{b}
|x-1| ~ |1-x|
e^{x+y} ~ e^x e^y
(-1)^{n} ~ \cos(n\pi)
\binom{n}{2} ~ \frac{n(n-1)}{2}
\frac{n!}{(n-2)!} ~ n(n-1)
\sec x ~ \frac{1}{\cos x}
\sin^{-1}\frac12 ~ \frac{\pi}{6}
\frac{\pi}{6}+2k\pi, k\in\mathbb{Z} ~ \frac{\pi}{6}+2\pi k
k\pi, k\in\mathbb{Z} ~ n\pi, n\in\mathbb{Z}
y=C e^{x} ~ C e^x
-\cos x + C ~ C-\cos x
\begin{bmatrix}1\\2\end{bmatrix} ~ \begin{pmatrix}1\\2\end{pmatrix}
(1,2) ~ \begin{pmatrix}1\\2\end{pmatrix}
2:3 ~ 4:6
2:3 ~ \frac{2}{3}
\text{no real solutions} ~ \text{No solution}
\emptyset ~ \text{no solution}
\text{infinitely many} ~ \text{Infinitely many}
1011_2 ~ 1011_{2}
AB = CD = 5 ~ 5
S = 12\pi ~ 12\pi
a+b = 17 ~ 17
m+n=17 ~ 17
x \approx 3.14 ~ 3.14
12\text{ cm}^2 ~ 12\text{ square cm}
12\text{ cm}^2 ~ 12\text{ sq cm}
5\,\mathrm{m} ~ 5\text{ meters}
10^{\circ}\text{C} ~ 10
20^\circ C ~ 20^\circ\text{C}
\frac{5}{2}\text{ cm} ~ 2.5 cm
\sqrt{2}\,\text{units} ~ \sqrt2
9.8 m/s^2 ~ 9.8\text{ m/s}^2
\left[\frac{1}{2}, \infty\right) ~ x \ge \frac12
1<x<2 ~ 2>x>1
x>2 ~ 2<x
-x<-2 ~ x>2
x^2<4 ~ -2<x<2
x\ge 0 ~ [0,\infty)
t \in [0,1] ~ 0 \leq t \leq 1
p \Rightarrow q ~ p \Rightarrow q
\{1,2,3\} ~ \{3,2,1\}
\{(1,2),(3,4)\} ~ \{(3,4),(1,2)\}
1,2,\ldots,n ~ 1, 2, \dots, n
x = 2, y = 3 ~ y = 3, x = 2
(x, y) = (2, 3) ~ (2,3)
x=2 \text{ and } y=3 ~ x=2, y=3
\text{(A)} ~ A
A. 5 ~ A
\text{Choice B} ~ B
The answer is 5 ~ 5
\text{Answer: } 5 ~ 5
5.0 ~ 5
+5 ~ 5
\frac{-1}{2} ~ -\frac{1}{2}
-\frac12 ~ -0.5
3^{100} ~ 9^{50}
\left(\frac{3}{4}\right)^{100} ~ \frac{3^{100}}{4^{100}}
10^{100} ~ 10^{50} \cdot 10^{50}
5 \cdot 10^{-3} ~ 0.005
6.02 \times 10^{23} ~ 602 \times 10^{21}
2i+1 ~ 1+2i
e^{i\pi/3} ~ \frac{1}{2}+\frac{\sqrt3}{2}i
\frac{1}{2}(1+i\sqrt{3}) ~ \frac{1+\sqrt{3}i}{2}
\cos\theta + i\sin\theta ~ e^{i\theta}
\left\lfloor\frac{n+1}{2}\right\rfloor ~ \lceil n/2 \rceil
x_{1}+x_{2} ~ x_1+x_2
2 \sin^2 x ~ 1 - \cos 2x
\tfrac{3}{4} ~ 0.75
.75 ~ \frac34
0.75 ~ 75\%
7{:}3 ~ 7:3
\frac{1}{2},\frac{1}{3} ~ 1/3, 1/2
(0,1)\cup(1,2) ~ (0,2)\setminus\{1\}
x<0 \lor x>1 ~ (-\infty,0)\cup(1,\infty)
\text{Friday} ~ friday
\frac{\mathrm{d}y}{\mathrm{d}x}=2x ~ 2x
g^{-1}(x) = x-1 ~ x-1
P(X=2)=\frac14 ~ \frac14
\angle A = 30^\circ ~ 30
n = 4k+1 ~ 4k+1
\sqrt{-9} ~ 3i
n\ge 3 ~ n \geq 3
2^{n+1} ~ 2\cdot 2^n
\text{odd} ~ odd
\frac{x^2}{4}-\frac{y^2}{9}=1 ~ 9x^2-4y^2=36
"""
_FIELD_WRONG = r"""
(1/2)^{2024} ~ (1/2)^{2025}
0 ~ 10^{-400}
0 ~ \frac{1}{2024!}
1 ~ 1-2^{-100}
\frac{r}{R} ~ \frac{R}{r}
1 ~ \frac{R}{r}
0 ~ \pi(R^2-r^2)
2a ~ 2A
12345678.0 ~ 12345679
100000.0 ~ 100000.4
0.3333 ~ \frac13
0.33333 ~ \frac13
3.1415927 ~ \frac{355}{113}
\text{(C) or (D)} ~ C
C, D ~ C
C/D ~ C
not C ~ C
\text{either B or C} ~ B
5 \text{ or } 6 ~ 5
5 \text{ is wrong; it is 6} ~ 5
5 \text{ (not } 6) ~ 5
\text{at least } 5 ~ 5
5 \text{ or more} ~ 5
\text{less than } 5 ~ 5
5 \text{ if } x>0 ~ 5
5 \text{ maybe} ~ 5
5?6 ~ 5
HHT ~ THH
BCA ~ ABC
\angle BAC ~ \angle ABC
\triangle ABC ~ \triangle ABD
\overline{AB} ~ \overline{AC}
2024-05-01 ~ 2024-01-05
05/01/2024 ~ 01/05/2024
2018 ~ 2024-01-05
\pm\sqrt2+\sqrt3 ~ \pm\sqrt2\pm\sqrt3
\sqrt2+\sqrt3 ~ \pm\sqrt2\pm\sqrt3
x<-1 \text{ and } x>1 ~ x<-1 \text{ or } x>1
x>1 \text{ or } x<3 ~ 1<x<3
(1,3) ~ x<1 \text{ or } x>3
\int_0^1 x^2 dx ~ \frac13
\sum_{k=1}^{10} k ~ 55
\lim_{x\to0} \frac{\sin x}{x} ~ 1
\gcd(12,18) ~ 6
\max(3,5) ~ 5
\text{lcm}(4,6) ~ 12
\int_0^1 x^2 dx = \frac14 ~ \frac13
(10^9)! ~ 5
(10^9)! ~ (10^8)!
9^{9^{9^9}} ~ 9
2^{2024} ~ 2^{2025}
10^{400} ~ 10^{500}
10^{308}\cdot 10 ~ 10^{310}
10^{1000}+1 ~ 10^{1000}
y=2x+1 ~ 2x-y-1=0
x=2 ~ y=2
3x+2y=5 ~ 3x+2y=6
x^2+y^2=4 ~ x^2+y^2=9
123,456 ~ 123,457
1,2,3 ~ 1,2,4
\text{Tim} ~ \text{Tom}
Tom ~ \text{Mot}
5 km ~ 5 m
30 apples ~ 30 oranges
72 \text{ km/h} ~ 72 \text{ m/s}
x<1 ~ x\le 1
x \ge 1 ~ (1,\infty)
\{x | x < 1\} ~ (1,\infty)
\mathbb{R} \setminus \{1\} ~ (-\infty,0)\cup(0,\infty)
\mathbb{R} ~ (-\infty,0)\cup(0,\infty)
x \equiv 2 \pmod 5 ~ 1 \pmod 5
1 \pmod 6 ~ 1 \pmod 5
1e6 ~ 1e5
pi ~ 3
\sqrt 2 ~ 2
0.\dot{3} ~ 0.3
\cos 36^\circ ~ \sin 36^\circ
\cos 36 ~ \cos 36^\circ
x ~ |x|
x^2 ~ |x|
\ln 2 ~ \log_{10} 2
\frac{x^2}{2} ~ \frac{x^2}{2}+C
kT ~ Kt
mM ~ Mm^2
2c ~ 2C
f(x) ~ g(x)
a_n ~ a_{n+1}
O(n) ~ O(n\log n)
(2,1) ~ (1,2)
[1,2] ~ (1,2)
\{1,2\} ~ (1,2)
1 ~ (1,2)
(1,2,3) ~ (1,2)
2:3 ~ 3:2
3:30 AM ~ 3:30 PM
4:30 PM ~ 3:30 PM
\text{no} ~ \text{yes}
\text{yes and no} ~ yes
1 ~ yes
\text{circle} ~ \text{ellipse}
3 = 5 ~ 3
2x = 10 ~ 10
x + 5 = 10 ~ 10
x = 3, x = 4 ~ x = 3
x = 3 \text{ or } 4 ~ 3
4:6 ~ 3:4
1011_2 ~ 1011_3
11 ~ 1011_2
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix}
10 ~ \begin{pmatrix}10 & 0\\0&1\end{pmatrix}
-i ~ i
1+2i ~ 2+i
\overline{z} ~ z
\frac{x}{y} ~ \frac{y}{x}
\sin x ~ \cos x
\sin x ~ \arcsin x
x^{-1} ~ x
2^3 ~ 3^2
\text{undefined} ~ 0
\emptyset ~ \{0\}
\infty ~ -\infty
\text{all real numbers} ~ x>0
n ~ n!
2\cdot 3 ~ 23
\sqrt[3]{2} ~ \sqrt[4]{2}
\lfloor x\rfloor ~ x
x ~ x_1
X ~ x
E ~ e
I ~ i
50\% ~ 5
0.5\% ~ 0.5\cdot 50
\$5 ~ £5
1 \text{ cm}^2 ~ 1\text{ cm}
5\text{ of } 6 ~ 5
5 \text{ out of } 6 ~ 5
5, \text{or}\ 6 ~ 5
\frac{1}{2} \neq ~ \frac12
x\neq 5 ~ 5
\text{not } 5 ~ 5
1 - 1 ~ 1
5 + \epsilon ~ 5
\frac{5}{1}x ~ 5
C+1 ~ C
A \cup B ~ A
A B ~ A
5! ~ 5
5^\circ ~ 5^2
(a,b) ~ (b,a)
12 \text{ or } 13 ~ 12, 13, 14
7,8 ~ 78
2024! ~ 2025!
1.0000001 ~ 1
0.9999999 ~ 1
\text{true or false} ~ true
ABCD ~ ABDC
1 \text{ through } 5 ~ 5
3^{2024} \bmod 7 ~ 2
17 \bmod 5 ~ 2
5\text{ plus one} ~ 5
5\text{ squared} ~ 5
5 \text{ negative} ~ 5
"""


def _pairs(lines: str) -> list[tuple[str, str]]:
    split = (line.split(" ~ ") for line in lines.strip().splitlines())
    return [(answer, reference) for answer, reference in split]


RIGHT["the field"] = _pairs(_FIELD_RIGHT)
WRONG["the field"] = _pairs(_FIELD_WRONG)
