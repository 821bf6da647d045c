#!lua flags=allow-oom
-- place: take the next entries of the llm stage, each together with its replica and its running place; and look around.
-- KEYS[1..3] job:llm_in:high, job:llm_in, job:llm_in:low
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] number of replicas R  ARGV[4] number of orders N
-- then R times: URL, slots (0: breaker open); then N times: priority owed (1..3), length L, L replica numbers (1..R)
-- Returns: time (us); jobs waiting; R rows {running (-1: a key of a wrong type), leases, us per token, tokens,
--   open_until_ms, seen_ms}; then per entry four values: stream number, entry id, fields, URL ('' when the entry is no
--   live job of ours, or holds a lease that cannot be moved).
-- Invariant: a job starts only in a free slot of its replica, counted here, so slots are exact over all llm processes.
--   All keys are looked at before the first entry is read: one of a wrong type has no slot, or no entry, and stops no
--   other; refused is only a call that could read nothing else.
local now_us = clock_us()
local group, consumer = ARGV[1], ARGV[2]
local count, orders = tonumber(ARGV[3]), tonumber(ARGV[4])
local function size(command, key)
  local reply = redis.pcall(command, key)
  return type(reply) == 'number' and reply or nil
end

-- The caller's picture may be older than a breaker that has just opened, or that lets one probe through by now.
local function slots_now(slots, open_until_ms)
  open_until_ms = tonumber(open_until_ms or '') or 0
  if open_until_ms * 1000 > now_us then return 0 end
  return open_until_ms > 0 and math.min(slots, 1) or slots
end

local urls, running, free, health, is_sound, at = {}, {}, {}, {}, {}, 5
for i = 1, count do
  local url = ARGV[at]
  urls[i] = url
  running[i] = size('ZCARD', KEY.running .. url)
  health[i] = redis.pcall('HMGET', KEY.health .. url, 'us_per_token', 'tokens', 'open_until_ms', 'seen_ms')
  is_sound[url] = running[i] and size('ZCARD', KEY.leases .. url) and true or false
  free[i] = is_sound[url] and slots_now(tonumber(ARGV[at + 1]), health[i][3]) - running[i] or 0
  at = at + 2
end

-- Another worker's replica, where this job was leased when it was submitted, may not be in the list.
local function can_lose_its(url)
  if url and is_sound[url] == nil then
    is_sound[url] = has_type(KEY.leases .. url, 'zset') and has_type(KEY.running .. url, 'zset')
  end
  return not url or is_sound[url]
end

local waiting, is_readable, unreadable = 0, {}, nil
for number = 1, 3 do
  local length = size('XLEN', KEYS[number])
  if length then
    waiting = waiting + length - call('XPENDING', KEYS[number], group)[1]
    is_readable[number] = true
  else
    unreadable = KEYS[number]
  end
end

local function read_one(number)
  if not is_readable[number] then return nil end
  local reply = call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', 1, 'STREAMS', KEYS[number], '>')
  return reply and reply[1][2][1]
end

local function next_entry(owed)
  local entry = read_one(owed)
  if entry then return owed, entry end
  for number = 1, 3 do
    if number ~= owed then
      entry = read_one(number)
      if entry then return number, entry end
    end
  end
  return nil
end

local taken = {}
for _ = 1, orders do
  local owed, length = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  local choice
  for i = at + 2, at + 1 + length do
    local replica = tonumber(ARGV[i])
    if not choice and free[replica] > 0 then choice = replica end
  end
  at = at + 2 + length
  if not choice then break end
  local number, entry = next_entry(owed)
  if not entry then break end
  local id = id_of(field_of(entry[2], 'data'))
  local live = id and redis.pcall('HMGET', KEY.live .. id, 'entry', 'lease')
  local url = ''
  if live and live[1] == entry[1] and can_lose_its(live[2]) then
    url = urls[choice]
    free[choice] = free[choice] - 1
    running[choice] = running[choice] + 1
    if live[2] ~= url then
      unlease(id, live[2])
      call('HSET', KEY.live .. id, 'lease', url)
      lease(id, url, now_us)
    end
    call('ZADD', KEY.running .. url, digits(now_us), id)
  end
  taken[#taken + 1] = number
  taken[#taken + 1] = entry[1]
  taken[#taken + 1] = entry[2]
  taken[#taken + 1] = url
end

if unreadable and #taken == 0 then error(unreadable .. ' should be a stream') end
local answer = {digits(now_us), waiting - #taken / 4}
for i = 1, count do
  local known = health[i]
  answer[#answer + 1] = {
    is_sound[urls[i]] and running[i] or -1, is_sound[urls[i]] and call('ZCARD', KEY.leases .. urls[i]) or 0,
    known[1] or '', known[2] or '', known[3] or '0', known[4] or '0',
  }
end
for _, value in ipairs(taken) do answer[#answer + 1] = value end
return answer
