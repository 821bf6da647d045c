#!lua flags=allow-oom
-- chat_take: the messages that a run is to answer, once it is time; and what the brains need to know.
-- ARGV[1] chat (as it stands in keys)  ARGV[2] run's job id  ARGV[3] 'begin' | 'go on' (with the messages taken before)
-- ARGV[4] at most (messages)  ARGV[5] wait for company of a single message to an idle chat (ms)  ARGV[6] quiet before a
--   batch is taken (ms)  ARGV[7] longest wait (ms)  ARGV[8] at most (characters of messages, but for the first)
-- Returns: time (us), 'lost' (the lock is not this run's) | 'empty' | 'wait' | 'taken', how long to wait (ms), when the
--   first message came (ms), elements that were not said (and that are gone now), persona (as in keys; ''), fields
--   of the persona (flat), state (JSON; ''), turns, messages.
-- Invariant: a run takes from the front, and nothing leaves the queue here: a run that begins again finds the same
--   messages, and perhaps more.
local now_us = clock_us()
local now_ms = math.floor(now_us / 1000)
local key = ARGV[1]
local about, queue = KEY.chat .. key, KEY.chat_queue .. key
local function answer(word, wait_ms, first_ms, dropped, persona, fields, state, messages)
  local turns = messages and call('LRANGE', KEY.chat_turns .. key, 0, -1) or {}
  return {digits(now_us), word, wait_ms or 0, first_ms or 0, dropped or 0, persona or '', fields or {}, state or '', turns,
    messages or {}}
end

check_chat(key)
local chat = read_chat(key)
if not chat or holder_of(key) ~= ARGV[2] then return answer('lost') end
local known = call('HMGET', about, 'persona', 'state', 'single', 'said_ms', 'typing_ms')
local fields = {}
if known[1] then
  check_type(KEY.persona .. known[1], 'hash')
  fields = call('HGETALL', KEY.persona .. known[1])
end
if ARGV[3] == 'go on' then return answer('taken', 0, 0, 0, known[1], fields, known[2], {}) end

local dropped, seen = 0, {}
for _, element in ipairs(call('LRANGE', queue, 0, -1)) do
  local id = said_id(key, element)
  if not id or seen[id] then dropped = dropped + call('LREM', queue, -1, element) end
  seen[id or ''] = true
end
end_vanished(key, chat, now_us)
local messages = call('LRANGE', queue, 0, ARGV[4] - 1)
if #messages == 0 then return answer('empty', 0, 0, dropped) end
local is_full, characters = #messages == tonumber(ARGV[4]), 0
for i = 1, #messages do
  local text = string.match(messages[i], '"text":"(.*)","at_ms":%d+}$') or messages[i]
  characters = characters + select(2, string.gsub(text, '[^\128-\191]', '')) -- each begins with another byte than these
  if i > 1 and characters > tonumber(ARGV[8]) then
    for j = #messages, i, -1 do messages[j] = nil end
    is_full = true
    break
  end
end
call('PEXPIRE', queue, digits(chat.queue_ms))
local first, first_ms = message_of(messages[1])
first_ms = tonumber(first_ms)
local typing_ms = tonumber(known[5] or '0')
local due_ms
if #messages == 1 and known[3] == first and typing_ms <= first_ms then
  due_ms = first_ms + ARGV[5]
else
  due_ms = math.min(math.max(tonumber(known[4] or '0'), typing_ms) + ARGV[6], first_ms + ARGV[7])
end
-- A message of the future: the clock was set back. Nobody waits until it is there again.
if due_ms > now_ms and first_ms <= now_ms and not is_full then
  return answer('wait', math.ceil(due_ms - now_us / 1000), first_ms, dropped)
end
call('HSET', about, 'taken', #messages, 'began', ARGV[2])
return answer('taken', 0, first_ms, dropped, known[1], fields, known[2], messages)
