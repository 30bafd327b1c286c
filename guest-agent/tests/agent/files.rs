//! File operations.

use super::client::{Agent, Connection};
use serde_json::json;
use std::os::unix::fs::{MetadataExt, symlink};
use torpor_api::guest::{FileEntry, FileType, FrameType, GuestErrorCode, GuestRequest, GuestResponse};

fn write(connection: Connection, contents: &[u8]) -> Result<GuestResponse, torpor_api::guest::GuestError> {
    let mut connection = connection;
    for chunk in contents.chunks(1 << 20) {
        connection.send(FrameType::Data, chunk);
    }
    connection.send(FrameType::DataEof, &[]);
    connection.outcome()
}

fn write_request(path: &str, mode: Option<u32>, append: bool) -> GuestRequest {
    GuestRequest::FileWrite {
        path: path.to_owned(),
        mode,
        append,
        offset: None,
        exclusive: false,
        user: None,
    }
}

/// A request as JSON, in which what is not said has its default.
fn ask_for(json: serde_json::Value) -> GuestRequest {
    serde_json::from_value(json).unwrap()
}

/// All entries of a list, in the order in which they came, and whether there are more.
fn listed(agent: &Agent, request: &GuestRequest) -> (Vec<FileEntry>, bool) {
    let mut connection = agent.connect().request(request);
    let mut entries: Vec<FileEntry> = Vec::new();
    loop {
        let (kind, payload) = connection.receive().unwrap();
        match kind {
            FrameType::Entries => entries.extend(serde_json::from_slice::<Vec<FileEntry>>(&payload).unwrap()),
            FrameType::Response => match serde_json::from_slice(&payload).unwrap() {
                GuestResponse::Listed { more } => return (entries, more),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?} {}", String::from_utf8_lossy(&payload)),
        }
    }
}

fn read_request(path: &str) -> GuestRequest {
    ask_for(json!({ "op": "file_read", "path": path, "offset": 0, "len": null }))
}

fn code(agent: &Agent, request: &GuestRequest) -> GuestErrorCode {
    agent.ask(request).expect_err("should be refused").code
}

#[test]
fn a_file_of_64_mebibytes_survives_the_round_trip() {
    let agent = Agent::start();
    let path = agent.path("new/directory/file").display().to_string();
    let contents: Vec<u8> = (0..16u32 << 20)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let written = write(
        agent.connect().request(&write_request(&path, Some(0o600), false)),
        &contents,
    );
    assert_eq!(written, Ok(GuestResponse::Transferred { bytes: 64 << 20 }));
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    let read = agent.connect().request(&read_request(&path)).finish();
    assert_eq!(read.outcome, Ok(GuestResponse::Transferred { bytes: 64 << 20 }));
    assert!(read.stdout == contents);
}

#[test]
fn a_part_of_a_file_can_be_read_and_a_file_can_be_appended_to_and_replaced() {
    let agent = Agent::start();
    let path = agent.path("file").display().to_string();
    write(
        agent.connect().request(&write_request(&path, None, false)),
        b"0123456789",
    )
    .unwrap();
    write(agent.connect().request(&write_request(&path, None, true)), b"abc").unwrap();
    let part = ask_for(json!({ "op": "file_read", "path": path.clone(), "offset": 8, "len": 3 }));
    assert_eq!(agent.connect().request(&part).finish().stdout, b"89a");
    let past = ask_for(json!({ "op": "file_read", "path": path.clone(), "offset": 100, "len": null }));
    assert_eq!(
        agent.connect().request(&past).finish().outcome,
        Ok(GuestResponse::Transferred { bytes: 0 })
    );
    write(agent.connect().request(&write_request(&path, None, false)), b"x").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"x");
}

#[test]
fn a_file_of_proc_which_claims_to_be_empty_is_read_whole() {
    let read = Agent::start()
        .connect()
        .request(&read_request("/proc/self/status"))
        .finish();
    assert!(String::from_utf8(read.stdout).unwrap().contains("torpor-guest"));
}

#[test]
fn a_list_and_a_stat_tell_what_is_there_without_following_links() {
    let agent = Agent::start();
    let directory = agent.path("d");
    std::fs::create_dir_all(directory.join("sub")).unwrap();
    std::fs::write(directory.join("a"), "12345").unwrap();
    symlink("/etc", directory.join("link")).unwrap();
    let path = directory.display().to_string();
    let (entries, more) = listed(&agent, &ask_for(json!({ "op": "file_list", "path": path })));
    assert!(!more);
    let kinds: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.file_type)).collect();
    assert_eq!(
        kinds,
        [
            ("a", FileType::File),
            ("link", FileType::Symlink),
            ("sub", FileType::Directory)
        ]
    );
    assert_eq!(entries[0].size, 5);
    assert_eq!(entries[1].symlink_target.as_deref(), Some("/etc"));
    let Ok(GuestResponse::Stat { entry }) = agent.ask(&ask_for(
        json!({ "op": "file_stat", "path": format!("{path}/a") }),
    )) else {
        panic!("no stat");
    };
    assert_eq!(entry, entries[0]);
}

#[test]
fn directories_are_made_moved_and_removed() {
    let agent = Agent::start();
    let at = |name: &str| agent.path(name).display().to_string();
    assert_eq!(
        agent.ask(&ask_for(json!({ "op": "make_dir", "path": at("a/b/c") }))),
        Ok(GuestResponse::Done)
    );
    agent
        .ask(&ask_for(
            json!({ "op": "file_move", "from": at("a"), "to": at("z") }),
        ))
        .unwrap();
    assert!(agent.path("z/b/c").is_dir());
    let remove = |recursive| ask_for(json!({ "op": "file_remove", "path": at("z"), "recursive": recursive }));
    assert_eq!(code(&agent, &remove(false)), GuestErrorCode::Conflict);
    agent.ask(&remove(true)).unwrap();
    assert!(!agent.path("z").exists());
    assert_eq!(code(&agent, &remove(true)), GuestErrorCode::NotFound);
}

#[test]
fn weird_paths_get_clear_errors() {
    let agent = Agent::start();
    let long = format!("/{}", "x".repeat(100_000));
    for (path, expected) in [
        ("", GuestErrorCode::BadRequest),
        ("relative", GuestErrorCode::BadRequest),
        ("/nul\0", GuestErrorCode::BadRequest),
        (&long, GuestErrorCode::Os),
        ("/no/such/../file", GuestErrorCode::NotFound),
        ("/etc/passwd/x", GuestErrorCode::Conflict),
    ] {
        let path = path.to_owned();
        for request in [
            json!({ "op": "file_list", "path": path }),
            json!({ "op": "file_stat", "path": path }),
            json!({ "op": "file_read", "path": path }),
            json!({ "op": "file_remove", "path": path, "recursive": true }),
            json!({ "op": "file_move", "from": path, "to": "/tmp/never" }),
            json!({ "op": "file_set", "path": path, "attributes": { "mode": 0o600 } }),
        ] {
            let request = ask_for(request);
            assert_eq!(code(&agent, &request), expected, "{:.60}", format!("{request:?}"));
        }
    }
    for path in ["/../../etc/passwd", "//etc///passwd", "/etc/./passwd"] {
        assert!(
            agent
                .ask(&ask_for(json!({ "op": "file_stat", "path": path })))
                .is_ok(),
            "{path}"
        );
    }
    assert!(agent.is_alive());
}

#[test]
fn only_regular_files_are_read_and_written() {
    let agent = Agent::start();
    let fifo = agent.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [
        fifo.to_str().unwrap(),
        "/dev/zero",
        "/",
        agent.socket().to_str().unwrap(),
    ] {
        assert_eq!(
            code(&agent, &read_request(path)),
            GuestErrorCode::Conflict,
            "{path}"
        );
        assert_eq!(
            code(&agent, &write_request(path, None, false)),
            GuestErrorCode::Conflict,
            "{path}"
        );
    }
    let bad_mode = write_request(agent.path("f").to_str().unwrap(), Some(0o10_0000), false);
    assert_eq!(code(&agent, &bad_mode), GuestErrorCode::BadRequest);
}

#[test]
fn a_writer_that_goes_or_talks_nonsense_hurts_nobody() {
    let agent = Agent::start();
    let request = write_request(agent.path("f").to_str().unwrap(), None, false);
    let mut goes = agent.connect().request(&request);
    goes.send(FrameType::Data, b"half");
    drop(goes);
    let mut nonsense = agent.connect().request(&request);
    nonsense.send(FrameType::Stdin, b"?");
    assert_eq!(nonsense.outcome().unwrap_err().code, GuestErrorCode::BadRequest);
    assert!(agent.is_alive());
}

#[test]
fn a_directory_of_any_size_is_listed_in_order_and_in_pages() {
    let agent = Agent::start();
    let directory = agent.path("large");
    std::fs::create_dir(&directory).unwrap();
    let mut names: Vec<String> = (0..8000).map(|i| format!("{i}-é{}", "x".repeat(60))).collect();
    for name in &names {
        std::fs::write(directory.join(name), "").unwrap();
    }
    names.sort();
    let path = directory.display().to_string();
    let (all, more) = listed(&agent, &ask_for(json!({ "op": "file_list", "path": path })));
    assert!(all.iter().map(|entry| &entry.name).eq(&names) && !more);
    let page = json!({ "op": "file_list", "path": path, "skip": 7990, "limit": 9 });
    let (page, more) = listed(&agent, &ask_for(page));
    assert!(page == all[7990..7999] && more);
}

#[test]
fn a_deep_list_shows_each_directory_before_what_it_holds() {
    let agent = Agent::start();
    std::fs::create_dir_all(agent.path("d/b/c/e")).unwrap();
    std::fs::write(agent.path("d/b/z"), "").unwrap();
    std::fs::write(agent.path("d/a"), "").unwrap();
    let names = |depth: u32| {
        let request = json!({ "op": "file_list", "path": agent.path("d"), "depth": depth });
        let (entries, _) = listed(&agent, &ask_for(request));
        entries
            .into_iter()
            .map(|entry| entry.name)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(
        (names(1).as_str(), names(2).as_str(), names(9).as_str()),
        ("a b", "a b c z", "a b c e z")
    );
}

#[test]
fn attributes_are_changed_one_by_one_and_shown_with_names() {
    let agent = Agent::start();
    let path = agent.path("f").display().to_string();
    std::fs::write(&path, "0123456789").unwrap();
    let stat = || match agent.ask(&ask_for(json!({ "op": "file_stat", "path": path }))) {
        Ok(GuestResponse::Stat { entry }) => entry,
        other => panic!("{other:?}"),
    };
    let set = |attributes| {
        agent
            .ask(&ask_for(
                json!({ "op": "file_set", "path": path, "attributes": attributes }),
            ))
            .unwrap()
    };
    assert_eq!(stat().owner.as_deref(), Some("root"));
    set(json!({ "mode": 0o750, "modified_unix_ms": 1_500_000_000_250_i64 }));
    set(json!({ "uid": 65534, "size": 4 }));
    let entry = stat();
    assert_eq!(
        (entry.mode, entry.size, entry.uid, entry.gid),
        (0o750, 4, 65534, 0)
    );
    assert_eq!(entry.owner.as_deref(), Some("nobody"));
    set(json!({ "modified_unix_ms": 1_500_000_000_250_i64 }));
    assert_eq!(stat().modified_unix_ms, 1_500_000_000_250);
    let link = agent.path("l");
    agent
        .ask(&ask_for(json!({ "op": "symlink", "path": link, "target": path })))
        .unwrap();
    let followed = agent.ask(&ask_for(
        json!({ "op": "file_stat", "path": link, "follow": true }),
    ));
    assert!(matches!(followed, Ok(GuestResponse::Stat { entry }) if entry.size == 4));
}

#[test]
fn a_write_can_begin_in_the_middle_and_can_insist_on_a_new_file() {
    let agent = Agent::start();
    let path = agent.path("f");
    std::fs::write(&path, "0123456789").unwrap();
    let request = ask_for(json!({ "op": "file_write", "path": path, "offset": 4 }));
    write(agent.connect().request(&request), b"ab").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"0123ab6789");
    let request = ask_for(json!({ "op": "file_write", "path": path, "exclusive": true }));
    assert_eq!(code(&agent, &request), GuestErrorCode::Conflict);
}

#[test]
fn an_operation_for_a_user_has_that_users_rights_and_no_other_operation_loses_its_own() {
    let agent = Agent::start();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(agent.directory.path(), open).unwrap();
    std::fs::write(agent.path("secret"), "x").unwrap();
    std::fs::set_permissions(
        agent.path("secret"),
        std::os::unix::fs::PermissionsExt::from_mode(0o600),
    )
    .unwrap();
    let denied = json!({ "op": "file_read", "path": agent.path("secret"), "user": "nobody" });
    assert_eq!(code(&agent, &ask_for(denied)), GuestErrorCode::PermissionDenied);
    let request = ask_for(json!({ "op": "file_write", "path": agent.path("d/theirs"), "user": "nobody" }));
    write(agent.connect().request(&request), b"1").unwrap();
    let owner = |name| std::fs::metadata(agent.path(name)).unwrap().uid();
    assert_eq!((owner("d/theirs"), owner("d")), (65534, 65534));
    let unknown = json!({ "op": "make_dir", "path": "/tmp/x", "user": "nobody-at-all" });
    assert_eq!(code(&agent, &ask_for(unknown)), GuestErrorCode::NotFound);
    let read = agent
        .connect()
        .request(&read_request(agent.path("secret").to_str().unwrap()))
        .finish();
    assert_eq!(read.stdout, b"x");
}
