//! A waker over one scripted guest, and clients that speak raw bytes.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use torpor_api::http::ServiceKind;
use torpor_api::{ErrorCode, ExecutionId};
use torpor_proxy::{Activity, Connected, Proxy, ProxyConfig, WakeRefusal, WakeRequest, WakeTrace, Waker};

/// A machine made of one guest address.
pub(crate) struct TestMachine {
    pub(crate) guest: Mutex<SocketAddr>,
    pub(crate) execution: Mutex<ExecutionId>,
    pub(crate) over: Mutex<CancellationToken>,
    pub(crate) refusal: Mutex<Option<WakeRefusal>>,
    pub(crate) trace: Mutex<Option<WakeTrace>>,
    pub(crate) asked: Mutex<Vec<WakeRequest>>,
    pub(crate) first_bytes: Arc<Mutex<Vec<Duration>>>,
    pub(crate) activity: Arc<Activity>,
    /// Connects pass while it is open; each test that holds them closes it first.
    pub(crate) awake: tokio::sync::watch::Sender<bool>,
    pub(crate) fresh: AtomicUsize,
    pub(crate) held: AtomicUsize,
    pub(crate) waiting: AtomicUsize,
    pub(crate) guards: Arc<AtomicUsize>,
    pub(crate) changed: tokio::sync::Notify,
}

impl TestMachine {
    pub(crate) fn at(guest: SocketAddr) -> Arc<Self> {
        Arc::new(Self {
            guest: Mutex::new(guest),
            execution: Mutex::new(ExecutionId::generate()),
            over: Mutex::default(),
            refusal: Mutex::default(),
            trace: Mutex::default(),
            asked: Mutex::default(),
            first_bytes: Arc::default(),
            activity: Arc::default(),
            awake: tokio::sync::watch::Sender::new(true),
            fresh: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            guards: Arc::default(),
            changed: tokio::sync::Notify::new(),
        })
    }

    pub(crate) fn refusing(code: ErrorCode, message: &str) -> Arc<Self> {
        let machine = Self::at(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
        *machine.refusal.lock().unwrap() = Some(WakeRefusal::new(code, message));
        machine
    }

    pub(crate) fn n_fresh(&self) -> usize {
        self.fresh.load(Ordering::SeqCst)
    }

    pub(crate) fn n_held(&self) -> usize {
        self.held.load(Ordering::SeqCst)
    }

    /// The machine slept and woke: another execution.
    pub(crate) fn next_execution(&self) {
        *self.execution.lock().unwrap() = ExecutionId::generate();
    }

    /// Waits for a predicate over the counters.
    pub(crate) async fn until(&self, predicate: impl Fn(&Self) -> bool) {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                if predicate(self) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait)
            .await
            .expect("the predicate never came true");
    }
}

struct Waiting<'a>(&'a TestMachine);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
        self.0.changed.notify_waiters();
    }
}

struct CountedGuard(Arc<AtomicUsize>);

impl Drop for CountedGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait::async_trait]
impl Waker for TestMachine {
    async fn connect(&self, request: WakeRequest) -> Result<Connected, WakeRefusal> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let waiting = Waiting(self);
        self.asked.lock().unwrap().push(request.clone());
        self.changed.notify_waiters();
        let mut awake = self.awake.subscribe();
        awake.wait_for(|awake| *awake).await.unwrap();
        drop(waiting);
        if let Some(refusal) = self.refusal.lock().unwrap().clone() {
            return Err(refusal);
        }
        let execution = self.execution.lock().unwrap().clone();
        let mut connected = if request.held.as_ref() == Some(&execution) {
            self.held.fetch_add(1, Ordering::SeqCst);
            Connected::held(execution)
        } else {
            self.fresh.fetch_add(1, Ordering::SeqCst);
            let guest = *self.guest.lock().unwrap();
            let stream = TcpStream::connect(guest)
                .await
                .map_err(|error| WakeRefusal::new(ErrorCode::ServiceUnreachable, error.to_string()))?;
            Connected::fresh(stream, execution)
        };
        connected.over = self.over.lock().unwrap().clone();
        connected.activity = Arc::clone(&self.activity);
        connected.trace = self.trace.lock().unwrap().take();
        self.guards.fetch_add(1, Ordering::SeqCst);
        connected.guard = Some(Box::new(CountedGuard(Arc::clone(&self.guards))));
        let first_bytes = Arc::clone(&self.first_bytes);
        connected.on_first_byte = Some(Box::new(move |after| first_bytes.lock().unwrap().push(after)));
        Ok(connected)
    }
}

/// A proxy with one service of `machine`.
pub(crate) struct TestProxy {
    pub(crate) proxy: Proxy,
    pub(crate) port: u16,
}

impl TestProxy {
    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    pub(crate) async fn connect(&self) -> Client {
        Client {
            stream: TcpStream::connect(self.address()).await.unwrap(),
            read: Vec::new(),
        }
    }

    /// One request on a connection of its own; answers everything up to the end of the connection.
    pub(crate) async fn exchange(&self, request: &str) -> String {
        let mut client = self.connect().await;
        client.send(request).await;
        client.rest().await
    }
}

pub(crate) fn proxy_of(machine: &Arc<TestMachine>, kind: ServiceKind, config: ProxyConfig) -> TestProxy {
    let proxy = Proxy::new(config, Arc::clone(machine) as Arc<dyn Waker>);
    let port = proxy.expose(0, kind).unwrap();
    TestProxy { proxy, port }
}

pub(crate) fn http_proxy(machine: &Arc<TestMachine>) -> TestProxy {
    proxy_of(machine, ServiceKind::Http, ProxyConfig::default())
}

pub(crate) fn tcp_proxy(machine: &Arc<TestMachine>) -> TestProxy {
    proxy_of(machine, ServiceKind::Tcp, ProxyConfig::default())
}

/// One side of a connection that is spoken byte by byte.
pub(crate) struct Client {
    pub(crate) stream: TcpStream,
    read: Vec<u8>,
}

impl Client {
    pub(crate) fn over(stream: TcpStream) -> Self {
        Self {
            stream,
            read: Vec::new(),
        }
    }

    pub(crate) async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    /// Reads up to and including `end`; bytes after it stay for the next read.
    pub(crate) async fn until(&mut self, end: &str) -> String {
        let read = async {
            loop {
                if let Some(at) = self
                    .read
                    .windows(end.len())
                    .position(|window| window == end.as_bytes())
                {
                    let taken: Vec<u8> = self.read.drain(..at + end.len()).collect();
                    return String::from_utf8(taken).unwrap();
                }
                let n_read = self.stream.read_buf(&mut self.read).await.unwrap();
                assert!(
                    n_read > 0,
                    "ended before {end:?}: {:?}",
                    String::from_utf8_lossy(&self.read)
                );
            }
        };
        tokio::time::timeout(Duration::from_secs(60), read)
            .await
            .expect("nothing more came")
    }

    /// A message's head.
    pub(crate) async fn head(&mut self) -> String {
        self.until("\r\n\r\n").await
    }

    /// Exactly so many bytes.
    pub(crate) async fn exactly(&mut self, len_bytes: usize) -> String {
        while self.read.len() < len_bytes {
            let n_read = self.stream.read_buf(&mut self.read).await.unwrap();
            assert!(n_read > 0, "ended early");
        }
        String::from_utf8(self.read.drain(..len_bytes).collect()).unwrap()
    }

    /// A response with a Content-Length, whole.
    pub(crate) async fn response(&mut self) -> (String, String) {
        let head = self.head().await;
        let len_bytes = head
            .to_ascii_lowercase()
            .lines()
            .find_map(|line| {
                line.strip_prefix("content-length: ")
                    .map(|len| len.parse().unwrap())
            })
            .expect("a content-length");
        let body = self.exactly(len_bytes).await;
        (head, body)
    }

    /// Everything up to the end of the connection; a reset counts as an end.
    pub(crate) async fn rest(&mut self) -> String {
        let read = async { while matches!(self.stream.read_buf(&mut self.read).await, Ok(1..)) {} };
        tokio::time::timeout(Duration::from_secs(60), read)
            .await
            .expect("the connection never ended");
        String::from_utf8(std::mem::take(&mut self.read)).unwrap()
    }
}

/// A guest that runs `script` on every connection.
pub(crate) async fn guest<F, Fut>(script: F) -> SocketAddr
where
    F: Fn(Client, usize) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for n in 0.. {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(script(Client::over(stream), n));
        }
    });
    address
}

/// A guest that answers each request on a connection with its own head (which must have no body).
pub(crate) async fn echo_guest() -> SocketAddr {
    guest(|mut client, _| async move {
        loop {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match client.stream.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_) => return,
                }
            }
            let head = String::from_utf8(head).unwrap();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{head}", head.len());
            client.send(&answer).await;
        }
    })
    .await
}

/// A one-shot signal between a test and its guest.
pub(crate) fn signal() -> (Arc<Semaphore>, Arc<Semaphore>) {
    let semaphore = Arc::new(Semaphore::new(0));
    (Arc::clone(&semaphore), semaphore)
}
