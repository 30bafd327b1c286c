//! torpord's APIs over simulated executions: what SDKs and clients are tried against where no virtual machine can run.
//! With the program `torpor-guest` each has a real guest agent on this host instead of a guest; without it guests know
//! a few commands and no files, and nothing that a client says is done to this host.
//!
//! `cargo run --example simulated_host -- <directory> [<torpor-guest>]` serves the native API on port 17070, Morph's on
//! 17071, Nullspace's on 17072 and SSH on 17022, with the token `test`. A pause stops the guest's processes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a tool for developers fails by panicking"
)]

use async_trait::async_trait;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use torpor_agent::api::{self, Token};
use torpor_agent::guest_client::GuestClient;
use torpor_agent::machine::clock::SystemClock;
use torpor_agent::machine::fleet::{Fleet, Settings};
use torpor_agent::machine::hypervisor::*;
use torpor_agent::machine::leases;
use torpor_agent::machine::simulated::{SimulatedHost, SimulatedHypervisor};
use torpor_agent::machine::usage::RunUsage;
use torpor_agent::ssh;
use torpor_agent::store::Store;
use torpor_agent::waker::{FleetWaker, ProxyListeners};
use torpor_api::http::Pools;
use torpor_api::vmm::{ExitReason, PersistStats};
use torpor_api::{ExecutionId, MachineId, SnapshotId};
use torpor_proxy::{Proxy, ProxyConfig};

struct Guest {
    agent: Child,
    socket: PathBuf,
}

struct Host {
    simulated: SimulatedHypervisor,
    directory: PathBuf,
    program: Option<PathBuf>,
    guests: Mutex<HashMap<MachineId, Guest>>,
}

struct WithGuest {
    execution: Arc<dyn Execution>,
    client: GuestClient,
    pid: u32,
}

impl Host {
    fn with_guest(&self, machine: &MachineId, execution: Arc<dyn Execution>) -> Arc<dyn Execution> {
        let Some(program) = &self.program else {
            return execution;
        };
        let mut guests = self.guests.lock().unwrap();
        let guest = guests
            .entry(machine.clone())
            .or_insert_with(|| start_guest(&self.directory.join(machine.as_str()), program));
        signal(guest.agent.id(), "CONT");
        Arc::new(WithGuest {
            execution,
            client: GuestClient::new(&guest.socket),
            pid: guest.agent.id(),
        })
    }
}

impl Host {
    fn socket_of(&self, machine: &MachineId) -> Option<PathBuf> {
        let guests = self.guests.lock().unwrap();
        guests.get(machine).map(|guest| guest.socket.clone())
    }
}

fn signal(pid: u32, name: &str) {
    let _ = Command::new("pkill")
        .args(["-e", "-g", &pid.to_string(), "--signal", name])
        .output();
}

fn start_guest(directory: &Path, program: &Path) -> Guest {
    use std::os::unix::process::CommandExt;
    std::fs::create_dir_all(directory).unwrap();
    let (socket, agent_socket) = (directory.join("vsock.sock"), directory.join("agent.sock"));
    let listener = UnixListener::bind(&socket).unwrap();
    let agent = Command::new(program)
        .arg("--no-init")
        .arg("--run-dir")
        .arg(directory.join("run"))
        .arg("--listen")
        .arg(format!("unix:{}", agent_socket.display()))
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(forward(client, agent_socket.clone()));
        }
    });
    Guest { agent, socket }
}

/// The VMM's part: the handshake, then bytes both ways.
async fn forward(client: UnixStream, agent_socket: PathBuf) {
    let mut client = BufReader::new(client);
    let mut line = String::new();
    client.read_line(&mut line).await.unwrap();
    let Ok(mut agent) = UnixStream::connect(&agent_socket).await else {
        return;
    };
    client.write_all(b"OK 1024\n").await.unwrap();
    let _ = copy_bidirectional(&mut client, &mut agent).await;
}

#[async_trait]
impl Hypervisor for Host {
    async fn boot(
        &self,
        machine: &MachineSpec,
        execution: &ExecutionId,
    ) -> Result<Arc<dyn Execution>, HypervisorError> {
        let booted = self.simulated.boot(machine, execution).await?;
        let booted = self.with_guest(&machine.id, booted);
        let Some(socket) = self.socket_of(&machine.id) else {
            return Ok(booted);
        };
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
        GuestClient::new(&socket).wait_ready(deadline).await.unwrap();
        Ok(booted)
    }
    async fn restore(
        &self,
        machine: &MachineSpec,
        execution: &ExecutionId,
        generation: u64,
        first_port: Option<u16>,
    ) -> Result<(Arc<dyn Execution>, WakeStages), HypervisorError> {
        let restored = self.simulated.restore(machine, execution, generation, first_port);
        let (restored, stages) = restored.await?;
        Ok((self.with_guest(&machine.id, restored), stages))
    }
    async fn adopt(&self) -> Vec<Adopted> {
        Vec::new()
    }
    async fn inspect_image(&self, machine: &MachineId) -> ImageState {
        self.simulated.inspect_image(machine).await
    }
    async fn delete_files(&self, machine: &MachineId) -> Result<(), HypervisorError> {
        if let Some(mut guest) = self.guests.lock().unwrap().remove(machine) {
            signal(guest.agent.id(), "KILL");
            let _ = guest.agent.wait();
        }
        self.simulated.delete_files(machine).await
    }
    async fn stage_snapshot(
        &self,
        machine: &MachineSpec,
        generation: u64,
        snapshot: &SnapshotId,
    ) -> Result<(), HypervisorError> {
        self.simulated.stage_snapshot(machine, generation, snapshot).await
    }
    async fn commit_snapshot(&self, snapshot: &SnapshotId) -> Result<u64, HypervisorError> {
        self.simulated.commit_snapshot(snapshot).await
    }
    async fn delete_snapshot(&self, snapshot: &SnapshotId) -> Result<(), HypervisorError> {
        self.simulated.delete_snapshot(snapshot).await
    }
    async fn snapshots(&self) -> Result<Vec<SnapshotId>, HypervisorError> {
        self.simulated.snapshots().await
    }
    /// The machine gets a guest agent of its own, and so processes of its own.
    async fn clone_snapshot(
        &self,
        snapshot: &SnapshotId,
        machine: &MachineSpec,
    ) -> Result<u64, HypervisorError> {
        self.simulated.clone_snapshot(snapshot, machine).await
    }
    async fn console_tail(&self, machine: &MachineId, max_bytes: u64) -> Result<Vec<u8>, HypervisorError> {
        self.simulated.console_tail(machine, max_bytes).await
    }
    async fn template(&self, name: &str) -> Option<TemplateInfo> {
        self.simulated.template(name).await
    }
    async fn templates(&self) -> Vec<TemplateInfo> {
        self.simulated.templates().await
    }
    fn pools(&self) -> Pools {
        self.simulated.pools()
    }
}

#[async_trait]
impl Execution for WithGuest {
    fn id(&self) -> &ExecutionId {
        self.execution.id()
    }
    async fn freeze(&self) -> Result<FreezeTrace, HypervisorError> {
        signal(self.pid, "STOP");
        self.execution.freeze().await
    }
    async fn pre_copy(&self) -> Result<(), HypervisorError> {
        self.execution.pre_copy().await
    }
    async fn persist(&self, generation: u64) -> Result<PersistStats, HypervisorError> {
        self.execution.persist(generation).await
    }
    async fn run(&self) -> Result<Ran, HypervisorError> {
        signal(self.pid, "CONT");
        self.execution.run().await
    }
    async fn quit(&self) {
        self.execution.quit().await;
    }
    fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.execution.exited()
    }
    async fn connect(&self, port: u16) -> Result<TcpStream, ConnectError> {
        let address = ("127.0.0.1", port);
        TcpStream::connect(address)
            .await
            .map_err(|_| ConnectError::Refused { port })
    }
    fn guest(&self) -> GuestClient {
        self.client.clone()
    }
    async fn first_byte(&self) {}
    async fn usage(&self) -> RunUsage {
        self.execution.usage().await
    }
    async fn status(&self) -> Result<VmmStatus, HypervisorError> {
        self.execution.status().await
    }
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1).map(PathBuf::from);
    let (directory, program) = (arguments.next().unwrap(), arguments.next());
    std::fs::create_dir_all(&directory).unwrap();
    let token_file = directory.join("token");
    std::fs::write(&token_file, "test").unwrap();
    let host = Host {
        simulated: SimulatedHypervisor(SimulatedHost::new()),
        directory: directory.clone(),
        program,
        guests: Mutex::default(),
    };
    let store = Store::open(&directory.join("torpor.db")).unwrap();
    let fleet = Fleet::new(store, Arc::new(host), Arc::new(SystemClock), Settings::default());
    let proxy = Arc::new(Proxy::new(
        ProxyConfig::default(),
        Arc::new(FleetWaker(fleet.clone())),
    ));
    fleet.routes().attach(Arc::new(ProxyListeners(proxy)));
    fleet.edge().set_api_token(Token::read(&token_file).unwrap());
    fleet.recover().await.unwrap();
    tokio::spawn(leases::run(fleet.clone()));
    let token = || Token::read(&token_file).unwrap();
    let served = [
        (17070, api::router_with_token(fleet.clone(), token())),
        (17071, api::morph::router(fleet.clone(), token())),
        (17072, api::nullspace::router(fleet.clone(), token())),
    ];
    let local = |port| std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let host = "127.0.0.1".to_owned();
    let gateway = ssh::start(&fleet, local(17022), host, &directory, Some(token())).await;
    let _gateway = gateway.unwrap();
    for (port, router) in served {
        api::serve_tcp(local(port), router, std::future::pending())
            .await
            .unwrap();
    }
    std::future::pending().await
}
