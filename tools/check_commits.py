"""Check the messages of a branch's commits: one change each, said so that the log can be read.

    python tools/check_commits.py                   # the commits that main's upstream does not have
    python tools/check_commits.py v0.1.0..HEAD      # those of a range
    python tools/check_commits.py --message FILE    # a message about to be committed, for a git hook

Without an upstream the commits since the last tag are checked, and without a tag the last commit.
Merges are passed over. Where there is no history to look at, that is said, and nothing fails.
"""

import argparse
import re
import subprocess
import sys

WIDTH = 72
# Messages were not held to this before; what is older stays as it is.
SINCE = "93106f5589d6eccbbfad0a68e98bf6d75e159ebe"
SAYS_NOTHING = {"fix", "fixup", "merge", "misc", "squash", "tweak", "update", "wip"}
# First words that look like a past tense, a participle or a third person, and are none.
IMPERATIVE = {
    "bias",
    "bring",
    "embed",
    "exceed",
    "feed",
    "focus",
    "need",
    "proceed",
    "seed",
    "string",
}
DOCS_OR_TESTS = re.compile(r"^(docs/|tests/|mkdocs\.yml$|.*\.md$)")
TRAILER = re.compile(r"^[A-Z][A-Za-z-]+: \S")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("range", nargs="?", help="commits, as git log takes them")
    parser.add_argument("--message", metavar="FILE", help="check this message for what is staged")
    given = parser.parse_args(arguments)
    if given.message:
        with open(given.message, encoding="utf-8") as file:
            message = without_comments(file.read())
        staged = git("diff", "--cached", "--name-only").splitlines()
        return report({"this message": problems(message, staged)})
    try:
        commits = list_commits(given.range)
    except NoHistory as why:
        print("no commit messages checked: %s" % why)
        return 0
    found = {}
    for commit in commits:
        message = git("log", "-1", "--format=%B", commit)
        files = git("show", "--format=", "--name-only", commit).splitlines()
        found[git("log", "-1", "--format=%h %s", commit).strip()] = problems(message, files)
    return report(found)


class NoHistory(Exception):
    """There are no commits to look at, and why."""


def list_commits(wanted=None):
    """List the commits to check, the newest first."""
    try:
        shallow = git("rev-parse", "--is-shallow-repository").strip()
    except (OSError, subprocess.CalledProcessError):
        raise NoHistory("this is no clone with a history") from None
    if shallow == "true":
        raise NoHistory("this clone is shallow")
    if not answers("rev-parse", "--verify", "HEAD"):
        raise NoHistory("nothing is committed yet")
    if wanted is None:
        base = find_base()
        wanted = "%s..HEAD" % base if base else "HEAD^!"
    older = ["^" + SINCE] if answers("cat-file", "-e", SINCE + "^{commit}") else []
    return git("rev-list", "--no-merges", wanted, *older).split()


def find_base():
    """Find where the branch begins: at main's upstream, else at the last tag; None without both."""
    for upstream in ("main@{upstream}", "origin/main"):
        if answers("rev-parse", "--verify", upstream) and answers("merge-base", upstream, "HEAD"):
            return git("merge-base", upstream, "HEAD").strip()
    if answers("describe", "--tags", "--abbrev=0"):
        return git("describe", "--tags", "--abbrev=0").strip()
    return None


def problems(message, files):
    """List what is wrong with a commit's message.

    Args:
        message: the whole of it.
        files: the paths that the commit changes.
    """
    subject, *rest = message.strip("\n").split("\n")
    words = subject.split()
    first = words[0].lower() if words else ""
    found = []
    if len(subject) > WIDTH:
        found.append("the subject has %d characters; at most %d fit" % (len(subject), WIDTH))
    if not re.match(r"[A-Z][a-z]+(-[a-z]+)?( |$)", subject):
        found.append("begin the subject with a verb, its first letter a capital")
    elif looks_finite(first):
        found.append("begin the subject with an imperative: %s is none" % words[0])
    if first in ("wip", "misc", "merge") or (first in SAYS_NOTHING and len(words) < 3):
        found.append("say in the subject what is changed")
    if subject.endswith("."):
        found.append("leave out the full stop of the subject")
    if ";" in subject:
        found.append("the subject holds two changes, joined by a semicolon: make two commits")
    if rest and rest[0].strip():
        found.append("leave the second line empty")
    body = [line for line in rest if line.strip() and not TRAILER.match(line)]
    if not body and not all(DOCS_OR_TESTS.match(file) for file in files):
        found.append("say why in a body; only changes of docs and tests alone need none")
    return found


def looks_finite(word):
    """Whether a verb seems to be a past tense, a participle or a third person."""
    if word in IMPERATIVE:
        return False
    return word.endswith(("ed", "ing")) or (word.endswith("s") and not word.endswith("ss"))


def without_comments(message):
    """Leave out what git itself does not keep of a message that was edited."""
    message = message.partition("# ------------------------ >8 ------------------------")[0]
    return "\n".join(line for line in message.split("\n") if not line.startswith("#"))


def report(found):
    """Write down every problem; answer the exit code."""
    for title, wrong in found.items():
        for problem in wrong:
            print("%s: %s" % (title, problem), file=sys.stderr)
    bad = sum(1 for wrong in found.values() if wrong)
    if bad:
        print("hint: git commit --amend, or git rebase -i for older ones", file=sys.stderr)
    else:
        print("%d commit message(s) checked" % len(found))
    return 1 if bad else 0


def git(*arguments):
    return subprocess.run(
        ["git", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=True
    ).stdout


def answers(*arguments):
    return subprocess.run(["git", *arguments], capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
