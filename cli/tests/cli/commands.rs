//! One test per promise of the command line.

use crate::support::{FakeTorpord, frame, stderr, stdout, torpor};
use std::io::{Read, Write};
use std::process::Stdio;

const WEB: &str = r#"{"id":"mch_aaaaaaaaaaaaaaaaaaaa","name":"web","status":"running","execution_id":"exe_aaaaaaaaaaaaaaaaaaaa","template":"base","vcpus":1,"mem_mib":512,"disk_mib":2048,"created_unix_ms":0,"since_unix_ms":0,"lease":{"seconds":900,"action":"pause","mode":"absolute","deadline_unix_ms":1,"remaining_ms":192000},"wake":{"http":true,"ssh":false,"tcp":true,"api":true},"services":[{"name":"app","port":8080,"kind":"http","listen_port":20001,"url":"http://127.0.0.1:20001"}],"metadata":{},"pauses":3,"wakes":2}"#;
const NOT_FOUND: &str = r#"{"error":"machine \"web\" not found","code":"machine_not_found","retryable":false,"suggested_action":"List the machines with GET /v1/machines.","request_id":"req_1"}"#;

#[test]
fn ls_prints_a_table_and_json_is_the_apis_own_body() {
    let body = format!("{{\"machines\":[{WEB}]}}");
    let torpord = FakeTorpord::answering(&[("GET /v1/machines", 200, &body)]);
    let table = stdout(&torpord.run(&["ls"]));
    assert_eq!(
        table,
        "NAME  STATUS   ID                        SIZE      LEASE       URLS\n\
         web   running  mch_aaaaaaaaaaaaaaaaaaaa  1 x 512M  3m12s left  http://127.0.0.1:20001\n"
    );
    assert_eq!(stdout(&torpord.run(&["ls", "-o", "json"])), format!("{body}\n"));
    assert_eq!(stdout(&torpord.run(&["--json", "ls"])), format!("{body}\n"));
}

#[test]
fn create_sends_what_the_options_say() {
    let torpord = FakeTorpord::answering(&[("POST /v1/machines", 201, WEB)]);
    let output = torpord.run(&[
        "create",
        "--name",
        "web",
        "--mem",
        "2G",
        "--disk",
        "20G",
        "--lease",
        "1h30m",
        "--sliding",
        "--publish",
        "8080:app",
        "--publish-tcp",
        "5432",
        "--no-wake",
        "http,tcp",
        "--meta",
        "a=b=c",
    ]);
    assert_eq!(
        stdout(&output),
        "web\nhttp://127.0.0.1:20001\n",
        "{}",
        stderr(&output)
    );
    let expected = r#"{"name":"web","template":"base","vcpus":1,"mem_mib":2048,"disk_mib":20480,"lease":{"seconds":5400,"action":"pause","mode":"sliding"},"wake":{"http":false,"ssh":true,"tcp":false,"api":true},"services":[{"name":"app","port":8080,"kind":"http","auth":"none"},{"port":5432,"kind":"tcp","auth":"none"}],"metadata":{"a":"b=c"}}"#;
    assert_eq!(torpord.asked()[0].body, expected);
}

#[test]
fn an_error_says_what_failed_its_code_and_what_to_do() {
    let torpord = FakeTorpord::answering(&[("GET /v1/machines/web", 404, NOT_FOUND)]);
    let output = torpord.run(&["get", "web"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "error: machine \"web\" not found (machine_not_found)\n  what to do: List the machines with GET /v1/machines.\n"
    );
    assert_eq!(stdout(&output), "");
}

#[test]
fn no_torpord_is_an_error_with_advice_and_wrong_usage_is_2() {
    let output = torpor(&["--socket", "/nonexistent/api.sock", "ls"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("cannot reach torpord at /nonexistent/api.sock: "),
        "{}",
        stderr(&output)
    );
    assert!(stderr(&output).contains("\n  what to do: Start it with 'systemctl start torpord'"));
    for wrong in [
        &["create", "--mem", "1.5G"][..],
        &["frobnicate"],
        &["lease", "web", "0"],
        &["exec", "web"],
    ] {
        assert_eq!(
            torpor(wrong).output().unwrap().status.code(),
            Some(2),
            "{wrong:?}"
        );
    }
}

/// What torpord's WebSocket says, as frames.
fn text(json: &str) -> Vec<u8> {
    frame(0x81, json.as_bytes())
}

fn output_of(stream: u8, bytes: &str) -> Vec<u8> {
    frame(0x82, &[&[stream], bytes.as_bytes()].concat())
}

#[test]
fn exec_streams_output_both_ways_and_passes_the_exit_code_on() {
    let said = [
        text(r#"{"type":"started","pid":7,"serial":1}"#),
        output_of(1, "out\n"),
        output_of(2, "err\n"),
        text(r#"{"type":"exit","exit_code":42,"timed_out":false}"#),
    ];
    let torpord = FakeTorpord::streaming("GET /v1/machines/web/exec/stream", said.concat());
    let mut child = torpord
        .command(&[
            "exec",
            "-e",
            "A=1",
            "-w",
            "/tmp",
            "--timeout",
            "5s",
            "web",
            "--",
            "sh",
            "-c",
            "-x",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all("grüße".as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (stdout(&output), stderr(&output)),
        ("out\n".to_owned(), "err\n".to_owned())
    );
    assert_eq!(output.status.code(), Some(42));
    let asked = torpord.asked_once();
    let start = r#"{"type":"start","command":{"argv":["sh","-c","-x"],"env":{"A":"1"},"cwd":"/tmp","timeout_ms":5000,"background":false},"stdin":true}"#;
    assert_eq!(asked.body, start);
}

#[test]
fn exec_tells_its_own_failures_from_the_commands() {
    for (code, expected) in [
        ("exec_timeout", 124),
        ("exec_failed", 126),
        ("machine_not_found", 125),
    ] {
        let error = NOT_FOUND.replace("machine_not_found", code);
        let said = text(&format!(r#"{{"type":"error","error":{error}}}"#));
        let torpord = FakeTorpord::streaming("GET /v1/machines/web/exec/stream", said);
        assert_eq!(
            torpord.run(&["exec", "web", "true"]).status.code(),
            Some(expected),
            "{code}"
        );
    }
    let timed_out = text(r#"{"type":"exit","exit_code":137,"timed_out":true}"#);
    let torpord = FakeTorpord::streaming("GET /v1/machines/web/exec/stream", timed_out);
    assert_eq!(torpord.run(&["exec", "web", "true"]).status.code(), Some(124));
    let refused = FakeTorpord::answering(&[("GET /v1/machines/web/exec/stream", 404, NOT_FOUND)]);
    assert_eq!(refused.run(&["exec", "web", "true"]).status.code(), Some(125));
    let output = torpor(&["--socket", "/nonexistent", "exec", "web", "true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
}

#[test]
fn exec_as_json_is_one_answer() {
    let answer = r#"{"pid":7,"exit_code":42,"stdout":"out\n","stderr":"err\n","truncated":false}"#;
    let torpord = FakeTorpord::answering(&[("POST /v1/machines/web/exec", 200, answer)]);
    let output = torpord.run(&["--json", "exec", "-u", "dev", "web", "true"]);
    assert_eq!(
        (stdout(&output), output.status.code()),
        (format!("{answer}\n"), Some(42))
    );
    let expected = r#"{"argv":["true"],"user":"dev","background":false}"#;
    assert_eq!(torpord.asked()[0].body, expected);
}

#[test]
fn exec_in_the_background_prints_the_pid() {
    let answer = r#"{"pid":7,"stdout":"","stderr":"","truncated":false}"#;
    let torpord = FakeTorpord::answering(&[("POST /v1/machines/web/exec", 200, answer)]);
    let output = torpord.run(&["exec", "-d", "web", "--", "sleep", "1000"]);
    assert_eq!(
        (stdout(&output), output.status.code()),
        ("7\n".to_owned(), Some(0))
    );
}

#[test]
fn too_much_input_is_refused_before_anything_runs() {
    let torpord = FakeTorpord::answering(&[]);
    let mut child = torpord
        .command(&["exec", "-d", "web", "cat"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The command may close its end before all is written.
    drop(child.stdin.take().unwrap().write_all(&vec![b'x'; 1 << 20]));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        stderr(&output).contains("longer than 512 KiB"),
        "{}",
        stderr(&output)
    );
    assert!(torpord.asked().is_empty());
}

#[test]
fn url_is_ready_for_a_command_substitution() {
    let torpord = FakeTorpord::answering(&[("GET /v1/machines/web", 200, WEB)]);
    for asked in [
        &["url", "web"][..],
        &["url", "web", "8080"],
        &["url", "web", "app"],
    ] {
        assert_eq!(stdout(&torpord.run(asked)), "http://127.0.0.1:20001\n");
    }
    let output = torpord.run(&["url", "web", "9090"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("has no service \"9090\""),
        "{}",
        stderr(&output)
    );
}

#[test]
fn lease_and_wake_show_without_arguments_and_change_with_them() {
    let torpord = FakeTorpord::answering(&[
        ("GET /v1/machines/web", 200, WEB),
        ("PUT /v1/machines/web/lease", 200, "{}"),
        ("PATCH /v1/machines/web/wake", 200, "{}"),
    ]);
    assert_eq!(stdout(&torpord.run(&["lease", "web"])), "3m12s left\n");
    assert_eq!(stdout(&torpord.run(&["wake", "web"])), "http, tcp, api\n");
    assert!(torpord.asked().iter().all(|asked| asked.what.starts_with("GET ")));
    torpord.run(&["lease", "web", "--none"]);
    torpord.run(&["lease", "web", "2m", "--on-expiry", "destroy"]);
    torpord.run(&["wake", "web", "--http", "off", "--ssh", "on"]);
    let bodies: Vec<String> = torpord
        .asked()
        .into_iter()
        .filter(|asked| !asked.what.starts_with("GET "))
        .map(|asked| asked.body)
        .collect();
    assert_eq!(
        bodies,
        [
            r#"{"lease":null}"#,
            r#"{"lease":{"seconds":120,"action":"destroy","mode":"absolute"}}"#,
            r#"{"http":false,"ssh":true}"#
        ]
    );
}

#[test]
fn rm_forgives_a_missing_machine_only_when_forced() {
    let torpord = FakeTorpord::answering(&[
        ("DELETE /v1/machines/web", 404, NOT_FOUND),
        ("DELETE /v1/machines/db", 204, ""),
    ]);
    assert_eq!(torpord.run(&["rm", "web", "db"]).status.code(), Some(1));
    let output = torpord.run(&["rm", "-f", "web", "db"]);
    assert_eq!(
        (stdout(&output), output.status.code()),
        ("db deleted\n".to_owned(), Some(0))
    );
}

#[test]
fn a_machines_name_stays_one_segment_of_the_path() {
    let torpord = FakeTorpord::answering(&[]);
    torpord.run(&["get", "../../etc?x"]);
    assert_eq!(
        torpord.asked()[0].what,
        "GET /v1/machines/%2E%2E%2F%2E%2E%2Fetc%3Fx"
    );
}

#[test]
fn events_are_read_page_by_page_to_the_end() {
    let event = |offset: u64| {
        format!(
            r#"{{"offset":{offset},"at_unix_ms":0,"machine_id":"mch_aaaaaaaaaaaaaaaaaaaa","kind":"machine.woken","actor":"http","detail":{{"us":5}}}}"#
        )
    };
    let page = |offset| format!("{{\"events\":[{}],\"next_offset\":{offset}}}", event(offset));
    let torpord = FakeTorpord::answering(&[
        ("GET /v1/machines/web/events?after=0&limit=500", 200, &page(1)),
        ("GET /v1/machines/web/events?after=1&limit=500", 200, &page(2)),
        (
            "GET /v1/machines/web/events?after=2&limit=500",
            200,
            r#"{"events":[],"next_offset":2}"#,
        ),
    ]);
    let text = stdout(&torpord.run(&["events", "web"]));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(
        lines[0].contains("1970-01-01T00:00:00.000Z") && lines[0].ends_with("http     {\"us\":5}"),
        "{text}"
    );
}

#[test]
fn a_reader_that_stops_early_is_no_failure() {
    let mut machines = vec![WEB; 2000].join(",");
    machines = format!("{{\"machines\":[{machines}]}}");
    let torpord = FakeTorpord::answering(&[("GET /v1/machines", 200, &machines)]);
    let mut child = torpord
        .command(&["ls"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 4];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (&first, stderr(&output).as_str(), output.status.code()),
        (b"NAME", "", Some(0))
    );
}

#[test]
fn something_else_at_the_socket_is_named_as_such() {
    let torpord = FakeTorpord::answering(&[("GET /v1/healthz", 200, "<html>hello")]);
    let output = torpord.run(&["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("which is not an answer of torpord: <html>hello"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn completions_need_no_torpord() {
    let output = torpor(&["completions", "bash"]).output().unwrap();
    assert!(output.status.success() && stdout(&output).contains("_torpor()"));
}

#[test]
fn doctor_reports_each_finding_and_its_exit_code_follows_the_verdicts() {
    let output = torpor(&["doctor", "--probe", "disk", "--state-dir", "/tmp", "-o", "json"])
        .output()
        .unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap();
    assert!(!findings.is_empty());
    let all_fine = findings.iter().all(|finding| finding["verdict"] != "no");
    assert_eq!(
        (report["ok"].as_bool(), output.status.success()),
        (Some(all_fine), all_fine)
    );
    let torpord = torpor(&["doctor", "--probe", "torpord", "--socket", "/nonexistent"])
        .output()
        .unwrap();
    assert_eq!(torpord.status.code(), Some(1));
    assert!(
        stdout(&torpord).starts_with("no    torpord"),
        "{}",
        stdout(&torpord)
    );
    assert!(stdout(&torpord).contains("what to do: "));
}

#[test]
fn env_prints_what_points_an_sdk_at_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, "t0ken\n").unwrap();
    let endpoints = format!(
        r#"{{"morph":"http://127.0.0.1:7071","nullspace":"http://127.0.0.1:7072","token_file":{:?}}}"#,
        token.to_str().unwrap()
    );
    let torpord = FakeTorpord::answering(&[("GET /v1/endpoints", 200, &endpoints)]);
    let printed = stdout(&torpord.run(&["env", "nullspace"]));
    assert!(
        printed.starts_with(
            "export NULLSPACE_API_URL='http://127.0.0.1:7072'\nexport NULLSPACE_API_KEY='t0ken'\n"
        ),
        "{printed}"
    );
}
