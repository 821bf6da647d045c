#!lua
-- say: put a message into a chat's queue and, where nobody holds the chat's lock, start a run: one step, or nothing.
-- ARGV[1] chat (as it stands in keys)  ARGV[2] chat id  ARGV[3] tenant  ARGV[4] message id  ARGV[5] message (JSON, its id
--   first, without its instant)  ARGV[6] id of a run, should one start  ARGV[7] tail of its envelope (see start_run)
-- ARGV[8] its stream  ARGV[9] its life (ms)  ARGV[10] life of the queue (ms)  ARGV[11] how long the chat is kept (ms)
-- ARGV[12] messages that may wait  ARGV[13] how long ids are remembered (ms)  ARGV[14] max live jobs  ARGV[15] max events
--   that wait to be recorded  ARGV[16] in-flight set ('' none)  ARGV[17] in-flight limit  ARGV[18] from how long without
--   a word a chat is idle (ms)  ARGV[19] how long a message may be the reason to interrupt a reply (ms)  ARGV[20] life of
--   a completion (ms)  ARGV[21] idempotency key ('' none)  ARGV[22] body hash  ARGV[23] its life (ms)
-- Returns: time (us), 'accepted' | 'duplicate' | 'mismatch' (the key was used with another body) | 'full' | 'overloaded' |
--   'backlog' | 'in_flight', messages that wait,
--   'started' | 'joined' (its run has not begun with the messages yet) | 'merged' (it waits for the next run) |
--   'interrupted' (the reply that was being made) | '', the id of the message that answers.
-- Invariant: no message without a run, no two runs of one chat, and a message id counts once. May be sent again.
local now_us = clock_us()
local now_ms = math.floor(now_us / 1000)
local key, id, idem = ARGV[1], ARGV[4], ARGV[21]
local about, queue, seen, open = KEY.chat .. key, KEY.chat_queue .. key, KEY.chat_seen .. key, KEY.chat_open .. key
local function answer(word, what)
  return {digits(now_us), word, call('LLEN', queue), what or '', id}
end

check_chat(key)
check_type(seen, 'zset')
check_type(ARGV[8], 'stream')
local holder = holder_of(key)
if holder and call('EXISTS', KEY.live .. holder) == 0 then holder = nil end -- somebody deleted its run by hand
if idem ~= '' then
  check_type(idem, 'hash')
  local known = call('HMGET', idem, 'hash', 'job')
  if known[1] and known[1] ~= ARGV[22] then return answer('mismatch') end
  id = known[2] or id
  if known[1] then return answer('duplicate', holder and 'joined') end
end
if call('ZSCORE', seen, id) or call('HEXISTS', open, id) == 1 then
  if idem ~= '' then
    call('HSET', idem, 'hash', ARGV[22], 'job', id)
    call('PEXPIRE', idem, ARGV[23])
  end
  return answer('duplicate', holder and 'joined')
end
if call('LLEN', queue) >= tonumber(ARGV[12]) then return answer('full') end
if call('XLEN', KEY.events) >= tonumber(ARGV[15]) then return answer('backlog') end
if not holder then
  if call('ZCARD', KEY.live_index) >= tonumber(ARGV[14]) then return answer('overloaded') end
  if ARGV[16] ~= '' then
    check_type(ARGV[16], 'set')
    if call('SCARD', ARGV[16]) >= tonumber(ARGV[17]) then return answer('in_flight') end
  end
end
local known = call('HMGET', about, 'epoch', 'active_ms', 'persona', 'taken')
local policy
if known[3] then
  check_type(KEY.persona .. known[3], 'hash')
  policy = call('HGET', KEY.persona .. known[3], 'policy')
end
local old = holder and policy == 'interrupt' and known[4] and read_live(holder)

call('HSET', about, 'id', ARGV[2], 'tenant', ARGV[3], 'tail', ARGV[7], 'stream', ARGV[8], 'life_ms', ARGV[9],
  'queue_ms', ARGV[10], 'keep_ms', ARGV[11], 'in_flight', ARGV[16], 'said_ms', digits(now_ms))
if not known[1] then call('HSET', about, 'epoch', digits(now_ms)) end
call('PEXPIRE', about, ARGV[11])
local chat = read_chat(key)
end_vanished(key, chat, now_us)
local element = string.sub(ARGV[5], 1, -2) .. ',"at_ms":' .. digits(now_ms) .. '}'
if idem ~= '' then
  call('HSET', idem, 'hash', ARGV[22], 'job', id)
  call('PEXPIRE', idem, ARGV[23])
end
local waiting = call('RPUSH', queue, element)
call('PEXPIRE', queue, ARGV[10])
call('HSET', open, id, element)
call('PEXPIRE', open, ARGV[11])
call('ZADD', seen, digits(now_ms), id)
call('ZREMRANGEBYSCORE', seen, '-inf', digits(now_ms - ARGV[13]))
call('ZREMRANGEBYRANK', seen, 0, -1001)
call('PEXPIRE', seen, ARGV[13])

local what = 'joined'
if not holder then
  local is_idle = not known[2] or tonumber(known[2]) + ARGV[18] < now_ms
  if waiting == 1 and is_idle then call('HSET', about, 'single', id) end
  start_run(key, chat, ARGV[6], now_us)
  what = 'started'
elseif chat.taken > 0 then
  what = 'merged'
  local _, first_ms = message_of(call('LINDEX', queue, 0))
  if old and first_ms and now_ms - first_ms < tonumber(ARGV[19]) then
    start_run(key, chat, ARGV[6], now_us) -- it has the lock from here on, so that what ends now changes nothing
    cancel_live(holder, old, ARGV[20], now_us)
    what = 'interrupted'
  end
end
call('HSET', about, 'active_ms', digits(now_ms))
conclude()
return answer('accepted', what)
