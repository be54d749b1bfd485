"""A process that asks a server many questions, and may be killed while it does."""

import sys

from limbeck.core.exchange import Question
from limbeck.core.specs import ServerTeacher, TokenPrice
from limbeck.core.types import Sampling, Turn
from limbeck.teachers.server import Server


def main() -> None:
    url, ledger, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    spec = ServerTeacher(
        url=url, model="m", ledger=ledger, in_flight=8, price=TokenPrice(input=1.0, output=2.0)
    )
    asked = (
        Question(id=f"q{k}", prompt=(Turn(text=f"question {k}", role="user"),))
        for k in range(count)
    )
    print("begun", flush=True)
    with Server(spec, display=False) as server:
        for _ in server.answers(asked, Sampling(max_tokens=30, temperature=1.0, seed=9)):
            pass


if __name__ == "__main__":
    main()
