//! The gateway over simulated machines that run the real guest agent, and a real SSH client.

mod client;

use super::*;
use crate::inside::tests::Lab;
use crate::machine::fleet::PolicyRule;
use client::{Answer, Client, Keys};
use serde_json::json;
use std::net::Ipv4Addr;
use torpor_api::http::{MachineStatus, PatchWake};

const TOKEN: &str = "the-token-of-this-host";

/// A machine behind a gateway.
struct Door {
    lab: Lab,
    gateway: Gateway,
}

impl Door {
    async fn open() -> Self {
        let lab = Lab::new().await;
        let gateway = start(
            &lab.world.fleet,
            SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            "127.0.0.1".to_owned(),
            lab.world.directory.path(),
            Some(Token::of(TOKEN)),
        )
        .await
        .unwrap();
        Self { lab, gateway }
    }

    fn morph_name(&self) -> String {
        format!("{}:{TOKEN}", self.lab.id)
    }

    async fn client(&self) -> Client {
        Client::connect(self.gateway.address()).await
    }

    async fn logged_in(&self) -> Client {
        let mut client = self.client().await;
        assert!(client.with_key(&self.morph_name(), &Keys::new()).await);
        client
    }

    async fn forbid_wakes(&self) {
        let off = PatchWake {
            ssh: Some(false),
            ..PatchWake::default()
        };
        let fleet = &self.lab.world.fleet;
        fleet
            .patch_wake(&self.lab.id, off, PolicyRule::DestroyOrWake)
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn a_command_gets_its_input_and_all_of_its_output_comes_before_its_code() {
    let door = Door::open().await;
    let client = door.logged_in().await;
    let channel = client
        .run("cat; echo err >&2; head -c 3000000 /dev/zero; exit 7")
        .await;
    channel.send(b"hello ").await;
    channel.send(b"world").await;
    channel.end().await;
    let answer = channel.finish().await;
    assert_eq!(&answer.stdout[..11], b"hello world");
    assert_eq!(answer.stdout.len(), 11 + 3_000_000);
    assert_eq!((answer.stderr.as_slice(), answer.code), (&b"err\n"[..], Some(7)));
}

#[tokio::test]
async fn a_shell_has_a_terminal_of_the_clients_size_and_the_environment_that_it_sent() {
    let door = Door::open().await;
    let client = door.logged_in().await;
    let channel = client.shell("vt100", (97, 31), &[("LC_THING", "set")]).await;
    channel.send(b"stty size; echo $TERM-$LC_THING; exit 3\n").await;
    let answer = channel.finish().await;
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    assert!(text.contains("31 97") && text.contains("vt100-set"), "{text:?}");
    assert_eq!(answer.code, Some(3));
}

#[tokio::test]
async fn a_session_outlives_a_pause_and_its_next_bytes_wake_the_machine() {
    let door = Door::open().await;
    let client = door.logged_in().await;
    let mut channel = client.run("cat").await;
    for round in 0..3 {
        let line = format!("before {round}\n");
        channel.send(line.as_bytes()).await;
        assert_eq!(channel.read(line.len()).await, line.as_bytes());
        door.lab.pause().await;
        assert_eq!(door.lab.status().await, MachineStatus::Paused);
        let line = format!("after {round}\n");
        channel.send(line.as_bytes()).await;
        assert_eq!(channel.read(line.len()).await, line.as_bytes());
        assert_eq!(door.lab.status().await, MachineStatus::Running);
    }
    channel.end().await;
    assert_eq!(channel.finish().await.code, Some(0));
}

#[tokio::test]
async fn a_login_wakes_a_paused_machine() {
    let door = Door::open().await;
    door.lab.pause().await;
    let client = door.logged_in().await;
    assert_eq!(
        client.run("echo awake").await.finish().await,
        Answer::of("awake\n")
    );
    assert_eq!(door.lab.status().await, MachineStatus::Running);
}

#[tokio::test]
async fn a_paused_machine_whose_switch_is_off_is_not_entered_and_sleeps_on() {
    let door = Door::open().await;
    door.forbid_wakes().await;
    assert!(
        door.client()
            .await
            .with_key(&door.morph_name(), &Keys::new())
            .await,
        "awake"
    );
    door.lab.pause().await;
    assert!(
        !door
            .client()
            .await
            .with_key(&door.morph_name(), &Keys::new())
            .await
    );
    assert_eq!(door.lab.status().await, MachineStatus::Paused);
}

#[tokio::test]
async fn only_the_right_credential_enters_and_only_its_machine() {
    let door = Door::open().await;
    let fleet = &door.lab.world.fleet;
    let id = door.lab.id.clone();
    let other = door.lab.world.create().await;
    let key = fleet.machine_ssh_key(&id).await.unwrap();
    let own = Keys::of(&key.private_key);
    let stranger = Keys::new();
    let try_key = async |name: &str, keys: &Keys| door.client().await.with_key(name, keys).await;
    let try_password = async |name: &str, text: &str| door.client().await.with_password(name, text).await;
    assert!(try_key(id.as_str(), &own).await);
    assert!(!try_key(other.as_str(), &own).await, "another machine");
    assert!(!try_key(id.as_str(), &stranger).await);
    assert!(!try_key("nobody", &own).await);
    assert!(
        !try_key(&format!("{id}:wrong"), &own).await,
        "a wrong API key outranks a right key"
    );
    assert!(try_password(id.as_str(), &key.password).await);
    assert!(try_password(id.as_str(), TOKEN).await);
    assert!(!try_password(id.as_str(), "").await);
    assert!(
        !try_password(other.as_str(), &key.password).await,
        "another machine"
    );
    let registered = NewSshKey {
        name: None,
        public_key: stranger.public_line(),
    };
    fleet.add_ssh_key(registered).await.unwrap();
    assert!(
        try_key(other.as_str(), &stranger).await,
        "a registered key opens every machine"
    );
    fleet.rotate_machine_ssh_key(&id).await.unwrap();
    assert!(!try_key(id.as_str(), &own).await, "rotated");
    assert!(!try_password(id.as_str(), &key.password).await, "rotated");
}

#[tokio::test]
async fn a_certificate_enters_the_machine_that_it_names_as_the_user_that_it_names() {
    let door = Door::open().await;
    let keys = Keys::new();
    let request = SshAccessRequest {
        public_key: keys.public_line(),
        expires_in_minutes: 5,
        user: "root".to_owned(),
    };
    let access = door
        .lab
        .world
        .fleet
        .grant_ssh_access(&door.lab.id, request)
        .await
        .unwrap();
    let mut client = door.client().await;
    assert!(
        !client
            .with_certificate("daemon", &keys, &access.certificate)
            .await
    );
    let mut client = door.client().await;
    assert!(client.with_certificate("root", &keys, &access.certificate).await);
    assert_eq!(client.run("echo in").await.finish().await, Answer::of("in\n"));
    door.lab
        .world
        .fleet
        .rotate_machine_ssh_key(&door.lab.id)
        .await
        .unwrap();
    let mut thief = door.client().await;
    assert!(
        !thief
            .with_certificate("root", &Keys::new(), &access.certificate)
            .await,
        "another's certificate"
    );
}

#[tokio::test]
async fn files_go_both_ways_also_over_a_pause() {
    let door = Door::open().await;
    let client = door.logged_in().await;
    let sftp = client.sftp().await;
    let at = |name: &str| door.lab.path(name);
    let contents: Vec<u8> = (0..1_000_000u32).map(|n| n.to_le_bytes()[1]).collect();
    sftp.create_dir(at("dir")).await.unwrap();
    assert!(sftp.create_dir(at("dir")).await.is_err(), "it is there");
    sftp.write_new(&at("dir/up"), &contents).await;
    door.lab.pause().await;
    assert_eq!(sftp.read(at("dir/up")).await.unwrap(), contents);
    assert_eq!(std::fs::read(at("dir/up")).unwrap(), contents);
    sftp.rename(at("dir/up"), at("dir/b")).await.unwrap();
    sftp.symlink("b", at("dir/link")).await.unwrap();
    assert_eq!(sftp.read_link(at("dir/link")).await.unwrap(), "b");
    let mut names: Vec<_> = sftp
        .read_dir(at("dir"))
        .await
        .unwrap()
        .map(|entry| entry.file_name())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["b", "link"]);
    let found = sftp.metadata(at("dir/link")).await.unwrap();
    assert_eq!((found.size, found.is_regular()), (Some(1_000_000), true));
    assert!(sftp.remove_dir(at("dir")).await.is_err(), "it is not empty");
    for name in ["dir/b", "dir/link"] {
        sftp.remove_file(at(name)).await.unwrap();
    }
    sftp.remove_dir(at("dir")).await.unwrap();
    assert!(sftp.metadata(at("dir")).await.is_err());
}

#[tokio::test]
async fn a_forwarded_connection_reaches_what_listens_on_loopback_only() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let door = Door::open().await;
    let client = door.logged_in().await;
    // The simulated guest's agent runs on this host.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut stream = client.forward("127.0.0.1", port).await.unwrap();
    let (mut served, _) = listener.accept().await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut got = Vec::new();
    served.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"ping");
    served.write_all(b"pong").await.unwrap();
    drop(served);
    let mut got = Vec::new();
    stream.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"pong");
    drop(listener);
    assert!(
        client.forward("127.0.0.1", port).await.is_none(),
        "nobody listens"
    );
    assert!(
        client.forward("example.com", 80).await.is_none(),
        "names are not looked up"
    );
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_process_with_it() {
    let door = Door::open().await;
    let client = door.logged_in().await;
    let mut channel = client.run("echo $$; exec sleep 1000").await;
    let pid: u32 = String::from_utf8(channel.line().await)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    drop((channel, client));
    let inside = door.lab.inside();
    loop {
        if !inside.process(pid).await.unwrap().running {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_idle_session_keeps_no_machine_awake() {
    let door = Door::open().await;
    let id = &door.lab.id;
    let lease = json!({ "seconds": 60, "action": "pause", "mode": "sliding" });
    let lease = serde_json::from_value(lease).unwrap();
    let fleet = door.lab.world.fleet.clone();
    fleet
        .set_lease(id, Some(lease), PolicyRule::DestroyOrWake)
        .await
        .unwrap();
    tokio::spawn(crate::machine::leases::run(fleet));
    let client = door.logged_in().await;
    let mut channel = client.run("cat").await;
    channel.send(b"x\n").await;
    assert_eq!(channel.read(2).await, b"x\n");
    door.lab.world.clock.advance(Duration::from_secs(200));
    while door.lab.status().await != MachineStatus::Paused {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    channel.send(b"y\n").await;
    assert_eq!(channel.read(2).await, b"y\n");
}
