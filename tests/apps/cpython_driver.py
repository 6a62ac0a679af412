"""cpython_driver.py OUTPUT NAME [RESOURCE...]: runs the tests of one module of CPython's own suite, NAME below `test`,
and appends a line of JSON for each to OUTPUT: [id, outcome]. NAME:TEXT runs those whose id holds TEXT, NAME:!TEXT the
others. At the end it writes ["", ""] and waits for the end of its stdin, so that its counters can be read. For any
CPython from 2.7 on."""
# ruff: noqa: UP008, UP010, UP028, UP031  (for Python 2)

from __future__ import print_function

import json
import os
import sys
import unittest

try:
    from test import support
except ImportError:
    from test import test_support as support


class Result(unittest.TestResult):
    def __init__(self, output):
        super(Result, self).__init__()
        self.output = output

    def say(self, test, outcome, error=None):
        print(json.dumps([test.id(), outcome]), file=self.output)
        self.output.flush()
        if error:
            print("%s: %s\n%s" % (outcome, test.id(), self._exc_info_to_string(error, test)), file=sys.stderr)
            sys.stderr.flush()

    def startTest(self, test):
        super(Result, self).startTest(test)
        self.say(test, "begun")

    def addSuccess(self, test):
        self.say(test, "ok")

    def addFailure(self, test, error):
        self.say(test, "failure", error)

    def addError(self, test, error):
        self.say(test, "error", error)

    def addSkip(self, test, reason):
        self.say(test, "skipped")

    def addExpectedFailure(self, test, error):
        self.say(test, "expected failure")

    def addUnexpectedSuccess(self, test):
        self.say(test, "unexpected success")

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.say(test, "failure" if issubclass(error[0], test.failureException) else "error", error)


def flat(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            for one in flat(test):
                yield one
        else:
            yield test


def main(path, name, resources):
    name, _, text = name.partition(":")
    sys.stdin = open(os.devnull)  # noqa: SIM115
    support.use_resources = resources  # none, as regrtest has it: nothing beyond this machine
    support.verbose = 0
    with open(path, "a") as output:
        result = Result(output)

        def run(suite):
            wanted = [test for test in flat(suite) if (text.lstrip("!") in test.id()) != text.startswith("!")]
            unittest.TestSuite(wanted if text else suite).run(result)

        support._run_suite = run
        suite = unittest.defaultTestLoader.loadTestsFromName("test." + name)
        module = sys.modules.get("test." + name)
        if hasattr(module, "test_main"):
            module.test_main()         # which prepares things, and calls _run_suite
        else:
            run(suite)
        print(json.dumps(["", ""]), file=output)
    while os.read(0, 100):
        pass


if __name__ == "__main__":
    os.dup2(2, 1)                      # what tests print is nobody's
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
