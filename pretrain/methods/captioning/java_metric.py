"""One metric of pycocoevalcap that starts Java: METEOR or SPICE.

`metrics.py` runs this file in a process of its own: pycocoevalcap has no time limits,
and waits for ever where Java dies. It imports nothing of this project.

    python java_metric.py METEOR < pairs.json

with a list of [candidate, [reference, ...]] of tokenized captions; the score is the last line.
"""

import json
import os
import socket
import sys
import urllib.error

DEAD_NETWORK = 20.0  # seconds without an answer


def main() -> None:
    pairs = json.load(sys.stdin)
    candidates = {number: [candidate] for number, (candidate, _) in enumerate(pairs)}
    references = {number: texts for number, (_, texts) in enumerate(pairs)}
    if sys.argv[1] == "METEOR":
        from pycocoevalcap.meteor.meteor import Meteor

        metric = Meteor()
    else:
        from pycocoevalcap.spice.spice import Spice

        socket.setdefaulttimeout(DEAD_NETWORK)
        try:
            metric = Spice()  # downloads, where it has not yet
        except (urllib.error.URLError, OSError) as error:
            sys.exit(
                "SPICE needs the Stanford CoreNLP 3.6.0 models (400 MB), which pycocoevalcap "
                "downloads from nlp.stanford.edu at its first use; that cannot be reached: "
                f"{getattr(error, 'reason', error)}"
            )
    score, _ = metric.compute_score(references, candidates)
    print(json.dumps(float(score)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        reason = f"its Java program failed ({type(error).__name__}: {error})"
        print(reason, file=sys.stderr, flush=True)
        # at once: the destructor of Meteor waits for the lock that its failed call still holds
        os._exit(1)
