//! File operations.

use super::client::{Agent, Connection};
use std::os::unix::fs::{MetadataExt, symlink};
use torpor_api::guest::{FileType, FrameType, GuestErrorCode, GuestRequest, GuestResponse};

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
    }
}

fn read_request(path: &str) -> GuestRequest {
    GuestRequest::FileRead {
        path: path.to_owned(),
        offset: 0,
        len: None,
    }
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
    let part = GuestRequest::FileRead {
        path: path.clone(),
        offset: 8,
        len: Some(3),
    };
    assert_eq!(agent.connect().request(&part).finish().stdout, b"89a");
    let past = GuestRequest::FileRead {
        path: path.clone(),
        offset: 100,
        len: None,
    };
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
    let Ok(GuestResponse::List { entries }) = agent.ask(&GuestRequest::FileList { path: path.clone() })
    else {
        panic!("no list");
    };
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
    let Ok(GuestResponse::Stat { entry }) = agent.ask(&GuestRequest::FileStat {
        path: format!("{path}/a"),
    }) else {
        panic!("no stat");
    };
    assert_eq!(entry, entries[0]);
}

#[test]
fn directories_are_made_moved_and_removed() {
    let agent = Agent::start();
    let at = |name: &str| agent.path(name).display().to_string();
    assert_eq!(
        agent.ask(&GuestRequest::MakeDir { path: at("a/b/c") }),
        Ok(GuestResponse::Done)
    );
    agent
        .ask(&GuestRequest::FileMove {
            from: at("a"),
            to: at("z"),
        })
        .unwrap();
    assert!(agent.path("z/b/c").is_dir());
    let remove = |recursive| GuestRequest::FileRemove {
        path: at("z"),
        recursive,
    };
    assert_eq!(code(&agent, &remove(false)), GuestErrorCode::Os);
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
        ("/etc/passwd/x", GuestErrorCode::Os),
    ] {
        let path = path.to_owned();
        for request in [
            GuestRequest::FileList { path: path.clone() },
            GuestRequest::FileStat { path: path.clone() },
            GuestRequest::FileRead {
                path: path.clone(),
                offset: 0,
                len: None,
            },
            GuestRequest::FileRemove {
                path: path.clone(),
                recursive: true,
            },
            GuestRequest::FileMove {
                from: path.clone(),
                to: "/tmp/never".to_owned(),
            },
        ] {
            assert_eq!(code(&agent, &request), expected, "{:.60}", format!("{request:?}"));
        }
    }
    for path in ["/../../etc/passwd", "//etc///passwd", "/etc/./passwd"] {
        assert!(
            agent
                .ask(&GuestRequest::FileStat {
                    path: path.to_owned()
                })
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
            GuestErrorCode::BadRequest,
            "{path}"
        );
        assert_eq!(
            code(&agent, &write_request(path, None, false)),
            GuestErrorCode::BadRequest,
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
fn a_directory_too_large_for_one_answer_is_an_error_not_a_broken_frame() {
    let agent = Agent::start();
    let directory = agent.path("large");
    std::fs::create_dir(&directory).unwrap();
    for i in 0..8000 {
        std::fs::write(directory.join(format!("{i}-{}", "x".repeat(60))), "").unwrap();
    }
    let request = GuestRequest::FileList {
        path: directory.display().to_string(),
    };
    assert_eq!(code(&agent, &request), GuestErrorCode::Os);
}
