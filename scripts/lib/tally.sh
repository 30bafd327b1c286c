# shellcheck shell=bash
# Adds up what the stages of scripts/test passed and failed. Source after common.sh.

PASSED=0 FAILED=0

tally() {
    PASSED=$((PASSED + $1))
    FAILED=$((FAILED + $2))
}

# stage TITLE CMD…: a check that passes or fails as a whole.
stage() {
    local title=$1 start=$SECONDS rc=0
    shift
    log "== $title"
    run "$@" || rc=$?
    tally "$((rc == 0))" "$((rc != 0))"
    log "== $title: $( ((rc == 0)) && echo ok || echo FAILED) in $((SECONDS - start)) s"
}

# counted TITLE CMD…: a stage that counts for itself; see `counts`. Exiting non-zero with no failure counted, or
# without any test run, is one failure: silence is not success.
counted() {
    local title=$1 start=$SECONDS rc=0 out passed failed
    shift
    log "== $title"
    out=$(mktemp)
    run "$@" 2>&1 | tee "$out" || rc=$?
    read -r passed failed < <(counts "$out")
    rm -f "$out"
    if ((rc != 0 && failed == 0)) || ((passed + failed == 0)); then failed=$((failed + 1)); fi
    tally "$passed" "$failed"
    log "== $title: $passed passed, $failed failed in $((SECONDS - start)) s"
}

# run CMD…: in the repository, with errexit on inside functions although our callers look at the result.
run() { (cd "$REPO" && bash -c 'set -euo pipefail; "$@"' run "$@"); }

# counts FILE: "PASSED FAILED" from the closing lines of nextest ("N tests run: N passed, N failed"), cargo test
# ("test result: ok. N passed; N failed") and ours ("N passed, N failed").
counts() {
    sed -E 's/\x1b\[[0-9;]*m//g' "$1" | awk '
        function n(word,    m) { return match($0, "[0-9]+ " word) ? substr($0, RSTART) + 0 : 0 }
        /^ *Summary .* tests? run:/ { p += n("passed"); f += n("failed") + n("timed out") + n("exec failed") }
        /^test result: /            { p += n("passed"); f += n("failed") }
        /^[0-9]+ passed, [0-9]+ failed$/ { p += n("passed"); f += n("failed") }
        END { print p + 0, f + 0 }'
}

# closing_line: the one line that tells it all; fails if anything did, or if nothing ran.
closing_line() {
    echo "$PASSED passed, $FAILED failed"
    ((FAILED == 0 && PASSED > 0))
}
