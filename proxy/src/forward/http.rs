//! HTTP: one client connection, its requests one after the other, or beside each other over HTTP/2.
//!
//! The task of the connection runs hyper's server and gives up on a client that is overdue. For each request it
//! asks the waker, sends the request to the guest at most once, and streams the answer back. One connection to a
//! guest is kept between requests, for the same target and the same execution only. A client that disconnects
//! drops the future of its request, and with it this waiter alone.

use super::tunnel::{Framing, Tunnel};
use super::upstream::{Link, MAX_HEADERS, SendError};
use super::{Permit, Shared};
use super::{admission, headers};
use crate::meter::{RequestBody, ResponseBody, Tally};
use crate::phase::{ClientSocket, Phase, UnderWay};
use crate::respond;
use crate::waker::{
    Admission, Cause, Connected, FirstByteHook, Guard, Line, Transport, Upstream, WakeRefusal, WakeRequest,
    WakeTrace,
};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use torpor_api::ErrorCode;

/// hyper refuses smaller buffers.
const LEAST_HEAD_BYTES: usize = 8192;
/// Requests that one HTTP/2 connection may have under way.
const MAX_STREAMS: u32 = 128;
const H2_PING_INTERVAL: Duration = Duration::from_secs(30);
/// Who has just come when the listener closes gets so long to say what for: nobody else would answer it.
pub(crate) const LAST_WORDS: Duration = Duration::from_millis(500);

/// Serves one accepted HTTP connection to its end; `closing` lets it finish the requests under way.
pub(crate) async fn serve_http<S>(shared: Arc<Shared>, stream: S, from: From, closing: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let phase = Phase::accepted();
    let client = from.client;
    let connection = Arc::new(Connection {
        shared: Arc::clone(&shared),
        from,
        phase: Arc::clone(&phase),
        link: Mutex::default(),
    });
    let service = service_fn(move |request| {
        let connection = Arc::clone(&connection);
        async move { Ok::<_, Infallible>(connection.handle(request).await) }
    });
    let io = TokioIo::new(ClientSocket::new(stream, Arc::clone(&phase)));
    let builder = builder(&shared);
    let mut serving = pin!(builder.serve_connection_with_upgrades(io, service));
    let mut overdue = pin!(phase.overdue(shared.config.head_timeout, shared.config.idle_timeout));
    let mut closed = pin!(async {
        closing.cancelled().await;
        if phase.awaits_head() {
            tokio::time::sleep(LAST_WORDS).await;
        }
    });
    let mut is_closing = false;
    loop {
        tokio::select! {
            served = serving.as_mut() => {
                if let Err(error) = served {
                    tracing::debug!(%client, error = %error, "a client connection broke off");
                }
                return;
            }
            () = &mut overdue => return,
            () = &mut closed, if !is_closing => {
                is_closing = true;
                serving.as_mut().graceful_shutdown();
            }
        }
    }
}

/// HTTP/1.1, and HTTP/2 for a client that begins with its preface.
fn builder(shared: &Shared) -> auto::Builder<Tracked> {
    let max_head_bytes = shared.config.max_head_bytes.max(LEAST_HEAD_BYTES);
    let mut builder = auto::Builder::new(Tracked(shared.tasks.clone()));
    builder
        .http1()
        .preserve_header_case(true)
        .auto_date_header(false)
        .header_read_timeout(None)
        .max_headers(MAX_HEADERS)
        .max_buf_size(max_head_bytes);
    builder
        .http2()
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(u32::try_from(max_head_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(Some(H2_PING_INTERVAL));
    builder
}

/// Runs the streams of an HTTP/2 connection as tasks that a shutdown waits for.
#[derive(Clone)]
struct Tracked(TaskTracker);

impl<F> hyper::rt::Executor<F> for Tracked
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, stream: F) {
        self.0.spawn(stream);
    }
}

/// Where a connection comes from.
pub(crate) struct From {
    pub(crate) client: SocketAddr,
    pub(crate) permit: Permit,
    /// Whether nobody on the way can read along.
    pub(crate) privacy: Privacy,
}

/// Whether a connection is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Privacy {
    Plain,
    Tls,
}

struct Connection {
    shared: Arc<Shared>,
    from: From,
    phase: Arc<Phase>,
    link: Mutex<Option<Link>>,
}

/// What the waker said about one request, without the way to the guest.
struct Leave {
    tally: Tally,
    over: CancellationToken,
    guard: Option<Guard>,
    line: Option<Arc<dyn Line>>,
    trace: Option<WakeTrace>,
    on_first_byte: Option<FirstByteHook>,
    waited: Duration,
}

/// When things happened to one request.
#[derive(Clone, Copy)]
struct Clock {
    accepted_at: Instant,
    head_complete_at: Instant,
}

impl Connection {
    async fn handle(&self, mut request: Request<Incoming>) -> Response<ResponseBody> {
        let clock = Clock {
            accepted_at: self.phase.request_began(),
            head_complete_at: Instant::now(),
        };
        // Ends it as well if the client goes away and this future is dropped.
        let under_way = UnderWay::on(&self.phase);
        if request.version() == Version::HTTP_2 {
            self.phase.is_multiplexed();
        }
        let on_upgrade = hyper::upgrade::on(&mut request);
        let response = match self.exchange(request, on_upgrade, clock).await {
            Ok(response) => response,
            Err(refusal) => respond::refusal(&refusal),
        };
        response.map(|body| body.ends(under_way))
    }

    async fn exchange(
        &self,
        request: Request<Incoming>,
        client_upgrade: OnUpgrade,
        clock: Clock,
    ) -> Result<Response<ResponseBody>, WakeRefusal> {
        if request.method() == Method::CONNECT {
            return Err(WakeRefusal::new(
                ErrorCode::MethodNotAllowed,
                "CONNECT is not for a reverse proxy",
            ));
        }
        let target = self
            .shared
            .route
            .target(&request)
            .map_err(|unknown| WakeRefusal::new(ErrorCode::MachineNotFound, unknown.to_string()))?;
        let mut asked = WakeRequest {
            target,
            transport: Transport::Http,
            client: self.from.client,
            accepted_at: clock.accepted_at,
            cause: cause_of(&request),
            held: None,
        };
        let (mut parts, incoming) = request.into_parts();
        let wants_upgrade = headers::asks_for_upgrade(&parts);
        let shown = admission::shown(&parts, wants_upgrade);
        let admission = self.shared.waker.admit(&asked, &shown).await?;
        asked.target = admission.target.clone();
        let framing = headers::framing(&parts);
        if wants_upgrade {
            asked.transport = Transport::Upgrade;
        }
        admission::take_off(&mut parts, &admission);
        headers::towards_guest(&mut parts, wants_upgrade);
        let request = prepare(Request::from_parts(parts, RequestBody::new(incoming)));
        let (response, link, leave) = self.send(asked, request, &admission).await?;
        let client_upgrade = wants_upgrade.then_some((client_upgrade, framing));
        let mut response = self.answer(response, link, leave, client_upgrade, clock)?;
        if let Some(cookie) = admission::set_cookie(&admission, self.from.privacy) {
            response.headers_mut().append(http::header::SET_COOKIE, cookie);
        }
        Ok(response)
    }

    /// Sends the request over the held link if the waker allows it, else over a new one. Only a request of which
    /// nothing was sent over a held link gets a second try.
    async fn send(
        &self,
        mut asked: WakeRequest,
        mut request: Request<RequestBody>,
        admission: &Admission,
    ) -> Result<(Response<Incoming>, Link, Leave), WakeRefusal> {
        let mut held = self
            .link()
            .take()
            // What is upgraded is a connection of its own from the start.
            .filter(|_| asked.transport == Transport::Http)
            .filter(|link| link.target == asked.target && !link.is_closed());
        let broken = request.body().broken();
        let mut trace = None;
        let mut on_first_byte = None;
        loop {
            asked.held = held.as_ref().map(|link| link.execution.clone());
            let connected = self.shared.waker.connect(asked.clone()).await?;
            let was_held = matches!(connected.upstream, Upstream::Held);
            let (link, mut leave) = self.link_for(connected, held.take(), &asked).await?;
            leave.trace = leave.trace.or(trace.take());
            leave.on_first_byte = leave.on_first_byte.or(on_first_byte.take());
            leave.tally.also.clone_from(&admission.also_count);
            let mut link = link;
            request.body_mut().count_in(leave.tally.clone());
            let _unanswered = leave.tally.machine.unanswered();
            match link.send(request).await {
                Ok(response) => return Ok((response, link, leave)),
                Err(SendError::Unsent(unsent)) if was_held => {
                    request = *unsent;
                    (trace, on_first_byte) = (leave.trace, leave.on_first_byte);
                }
                Err(SendError::Unsent(_)) => {
                    return Err(upstream_closed("before it took the request"));
                }
                Err(SendError::Sent(_)) if broken.load(Ordering::Acquire) => {
                    let message = "the request's body broke off or is not well-formed";
                    return Err(WakeRefusal::new(ErrorCode::InvalidRequest, message));
                }
                Err(SendError::Sent(error)) => return Err(no_answer(&error)),
            }
        }
    }

    async fn link_for(
        &self,
        connected: Connected,
        held: Option<Link>,
        asked: &WakeRequest,
    ) -> Result<(Link, Leave), WakeRefusal> {
        let Connected {
            upstream,
            execution,
            over,
            activity,
            guard,
            line,
            trace,
            on_first_byte,
        } = connected;
        let waited = asked.accepted_at.elapsed();
        let leave = Leave {
            tally: Tally {
                machine: activity,
                also: None,
            },
            over: over.clone(),
            guard,
            line,
            trace,
            on_first_byte,
            waited,
        };
        let link = match (upstream, held) {
            (Upstream::Fresh(stream), _) => {
                Link::open(stream, asked.target.clone(), execution, over, &self.shared.tasks)
                    .await
                    .map_err(|_| upstream_closed("before it took the request"))?
            }
            (Upstream::Held, Some(link)) if link.execution == execution => link,
            (Upstream::Held, _) => {
                let message = format!("no connection to execution {execution} is held");
                return Err(WakeRefusal::new(ErrorCode::Internal, message));
            }
        };
        Ok((link, leave))
    }

    fn answer(
        &self,
        mut response: Response<Incoming>,
        link: Link,
        leave: Leave,
        client_upgrade: Option<(OnUpgrade, Framing)>,
        clock: Clock,
    ) -> Result<Response<ResponseBody>, WakeRefusal> {
        let Leave {
            tally,
            over,
            guard,
            line,
            trace,
            on_first_byte,
            waited,
        } = leave;
        if let Some(hook) = on_first_byte {
            hook(clock.accepted_at.elapsed());
        }
        let guest_upgrade =
            (response.status() == StatusCode::SWITCHING_PROTOCOLS).then(|| hyper::upgrade::on(&mut response));
        let (mut parts, incoming) = response.into_parts();
        // A proxy speaks its own version; hyper goes down to 1.0 for a client that does.
        parts.version = Version::HTTP_11;
        if let Some(trace) = trace {
            let accept = clock.head_complete_at.duration_since(clock.accepted_at);
            headers::add_server_timing(&mut parts.headers, waited, accept, &trace);
        }
        let body = match (guest_upgrade, client_upgrade) {
            (Some(guest), Some((client, framing))) => {
                let permit = Arc::clone(&self.from.permit);
                let tunnel = Tunnel {
                    framing,
                    tally,
                    line,
                    over,
                    guard,
                    on_first_byte: None,
                    accepted_at: clock.accepted_at,
                };
                self.shared.tasks.spawn(async move {
                    join_upgraded(client, guest, tunnel).await;
                    drop(permit);
                });
                ResponseBody::own(bytes::Bytes::new())
            }
            (Some(_), None) => return Err(upstream_closed("after it switched protocols unasked")),
            (None, _) => {
                headers::towards_client(&mut parts.headers);
                *self.link() = Some(link);
                ResponseBody::guest(incoming, tally, over, guard)
            }
        };
        Ok(Response::from_parts(parts, body))
    }

    fn link(&self) -> MutexGuard<'_, Option<Link>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Joins two connections that have agreed to speak something else than HTTP.
async fn join_upgraded(client: OnUpgrade, guest: OnUpgrade, tunnel: Tunnel) {
    let joined = match tokio::try_join!(client, guest) {
        Ok((client, guest)) => tunnel.join(TokioIo::new(client), TokioIo::new(guest)).await,
        Err(error) => return tracing::debug!(error = %error, "an upgraded connection closed before it began"),
    };
    if let Err(error) = joined {
        tracing::debug!(error = %error, "an upgraded connection broke off");
    }
}

/// Lets an `Expect: 100-continue` go end to end: the client is told to go on when the guest says so.
fn prepare(mut request: Request<RequestBody>) -> Request<RequestBody> {
    if headers::expects_continue(request.headers()) && !request.body().is_end_stream() {
        let go_on = Arc::new(Notify::new());
        request.body_mut().wait_for(Arc::clone(&go_on));
        hyper::ext::on_informational(&mut request, move |response| {
            if response.status() == StatusCode::CONTINUE {
                go_on.notify_one();
            }
        });
    }
    request
}

fn cause_of(request: &Request<Incoming>) -> Cause {
    let cut = |text: &str| {
        let end = text.floor_char_boundary(Cause::MAX_TEXT_BYTES);
        text.get(..end).unwrap_or_default().to_owned()
    };
    let agent = request.headers().get(http::header::USER_AGENT);
    Cause {
        method: Some(cut(request.method().as_str())),
        path: Some(cut(request.uri().path())),
        user_agent: agent.map(|agent| cut(&String::from_utf8_lossy(agent.as_bytes()))),
    }
}

fn upstream_closed(when: &str) -> WakeRefusal {
    WakeRefusal::new(
        ErrorCode::UpstreamClosed,
        format!("the guest closed the connection {when}"),
    )
}

fn no_answer(error: &hyper::Error) -> WakeRefusal {
    if error.is_parse() {
        let message = format!("the guest's answer is not HTTP: {error}");
        return WakeRefusal::new(ErrorCode::UpstreamClosed, message);
    }
    upstream_closed("before it answered")
}
